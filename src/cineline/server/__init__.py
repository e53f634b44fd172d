"""The service: OpenAI's videos API over one engine, with jobs that are never lost."""
