"""How a prompt is put to Qwen2.5-VL (diffusers' `QwenImagePipeline`; no torch)."""

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)

DROPPED = 34
"""Tokens of the template before the prompt, which the transformer does not see."""

LONGEST = 1024 + DROPPED
"""Tokens that are encoded; longer prompts are cut off."""

MOST_TEXT = 512
"""Of these, those that the transformer sees."""
