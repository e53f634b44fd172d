"""A trained model to a folder in diffusers format, as it ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from cineline.families.wan.spec import DEFAULTS_FILE
from training.recipes import FRAMES, Recipe
from training.transformer import SHIFT, Student


def export(recipe: Recipe, name: str, vae: AutoencoderKLWan, students: list[Student], work: Path, folder: Path) -> None:
    """Write the pipeline's components, the default request, card and licence; the transformers of two students are
    the experts, high noise first.

    Args:
        work: where it is put together before it is moved to `folder`.

    Transformers and VAE are kept in half precision (the scores are those of the files as they ship); the text encoder
    in single, because transformers loads it in the precision of its file.
    """
    transformers: list[WanTransformer3DModel] = [student.transformer.half() for student in students]
    pipeline = WanPipeline(
        tokenizer=students[0].tokenizer,
        text_encoder=students[0].text_encoder.float(),
        vae=vae.half(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
        ),
        transformer=transformers[0],
        transformer_2=transformers[1] if recipe.boundary_ratio else None,
        boundary_ratio=recipe.boundary_ratio,
        expand_timesteps=recipe.boundary_ratio is None,
    )
    unfinished = work / "export"
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    (unfinished / DEFAULTS_FILE).write_text(json.dumps(_defaults(recipe), indent=2) + "\n")
    here = Path(__file__).parent
    shutil.copy(here / "cards" / f"{name}.md", unfinished / "README.md")
    shutil.copy(here.parent / "LICENSE", unfinished / "LICENSE")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(unfinished, folder)


def _defaults(recipe: Recipe) -> dict[str, float]:
    guidance = {"guidance_scale": 3.0} | ({"guidance_scale_2": 3.0} if recipe.boundary_ratio else {})
    size = {"height": recipe.side, "width": recipe.side, "num_frames": FRAMES, "fps": 8}
    return size | {"num_inference_steps": 25} | guidance
