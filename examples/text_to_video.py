"""Several prompts in flight over two stages: python examples/text_to_video.py [MODEL]."""

import sys

from cineline import Engine, ParallelConfig, VideoRequest

PROMPTS = [
    "a red square moving left on a blue background",
    "a green circle growing on a black background",
    "a yellow triangle moving up on a white background",
]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None  # a folder in diffusers format or a hub id
    with Engine(model, parallel=ParallelConfig(pp=2)) as engine:
        handles = [engine.submit(VideoRequest(prompt=prompt, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
        for number, handle in enumerate(handles):
            video = handle.result()
            video.save(f"text_{number}.mp4")
            print(f"text_{number}.mp4: frames {video.frames.shape}, latents {tuple(video.latents.shape)}")


if __name__ == "__main__":
    main()
