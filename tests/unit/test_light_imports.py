"""What workers import: no more than they need, so that hundreds of them start soon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BlipForConditionalGeneration

from tests.tiny_models import blip_config, save_blip

HEAVY = ("torch", "transformers", "faiss", "img2dataset", "scipy")


def imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of these modules a new process has imported after it has run ``code``."""
    code = f"import sys\n{code}\nprint(*(name for name in {names} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "module",
    ["pipeline.config", "pipeline.dag", "pipeline.engine.board", "pipeline.engine.data"],
)
def test_what_is_heavy_is_imported_by_those_who_need_it(module: str) -> None:
    assert imported(f"import {module}", HEAVY) == []


def test_images_are_resized_without_the_rest_of_img2dataset() -> None:
    code = """
import io
from PIL import Image
from stages.keeper import ImageConfig, ImageKeeper
file = io.BytesIO()
Image.new("RGB", (64, 48)).save(file, "JPEG")
assert ImageKeeper(ImageConfig(image_size=32))(file.getvalue()).height == 32
"""
    names = ("cv2", "torch", "pandas", "wandb", "ray")
    assert imported(code, names) == ["cv2"]


def test_a_model_is_loaded_without_the_compiler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_blip(BlipForConditionalGeneration(blip_config()), tmp_path)
    code = f"""
from PIL import Image
from stages.models.captioner import Captioner
assert Captioner({str(tmp_path)!r})([Image.new("RGB", (40, 40))])
"""
    assert imported(code, ("torch", "sympy", "torch._dynamo")) == ["torch"]
