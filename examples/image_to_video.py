"""A picture and a prompt to a video: python examples/image_to_video.py [IMAGE [MODEL]]."""

import sys

from PIL import Image, ImageDraw

from cineline import Engine, ParallelConfig, VideoRequest


def red_square() -> Image.Image:
    """A first frame for those who have none at hand."""
    image = Image.new("RGB", (128, 128), "blue")
    ImageDraw.Draw(image).rectangle((70, 44, 110, 84), fill="red")
    return image


def main() -> None:
    image = Image.open(sys.argv[1]) if len(sys.argv) > 1 else red_square()
    model = sys.argv[2] if len(sys.argv) > 2 else None
    with Engine(model, parallel=ParallelConfig(pp=2)) as engine:
        # No height and width: the picture's aspect ratio at the model's default area.
        handle = engine.submit(VideoRequest(prompt="a red square moving left on a blue background", image=image))
        print(f"{handle.job.width}x{handle.job.height}, {handle.job.num_frames} frames, {handle.job.steps} steps")
        handle.result().save("image.mp4")
        print("image.mp4")


if __name__ == "__main__":
    main()
