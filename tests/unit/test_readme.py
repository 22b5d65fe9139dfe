"""What the README shows to type into a notebook runs as it stands, but for the weights' names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_models import captioner_model, clip_model, matcher_model, save_blip, save_clip

SNIPPETS = re.findall(r"```python\n(.*?)```", Path("README.md").read_text("utf-8"), re.DOTALL)
HUB_IDS = {
    "Salesforce/blip-image-captioning-base": "captioner",
    "Salesforce/blip-itm-base-coco": "matcher",
    "openai/clip-vit-base-patch32": "embedder",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_blip(captioner_model(), folder / "captioner")
    save_blip(matcher_model(), folder / "matcher")
    save_clip(clip_model(), folder / "embedder")
    Image.new("RGB", (40, 30), "orange").save(folder / "cat.jpg")
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[*HUB_IDS.values()])
def test_a_snippet_prints_something(
    snippet: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for hub_id, folder in HUB_IDS.items():
        snippet = snippet.replace(hub_id, str(models / folder))
    monkeypatch.chdir(models)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")
