"""A transformers model folder or hub id: what it says it is, and its tensors, never unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from stages.errors import CheckpointError
from stages.models.config import TextConfig, VisionConfig
from stages.models.preprocessing import Preprocessing
from stages.models.text import load_tokenizer
from stages.models.vision import shapes_only

if TYPE_CHECKING:
    from transformers import BertTokenizer

M = TypeVar("M", bound=nn.Module)

MATCHER_PARTS = ("vision_model.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
CAPTIONER_PARTS = ("vision_model.", "text_decoder.")
MOMENTUM_PARTS = ("vision_model_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.")
QUEUES = ("image_queue", "text_queue", "image_id_queue", "queue_ptr")
_READ_OF_DECODER = ("text_decoder.bert.", "text_decoder.cls.predictions.")
_BLIP_PARTS = (*MATCHER_PARTS, *_READ_OF_DECODER, *MOMENTUM_PARTS)
_BLIP_TENSORS = {"temp", *QUEUES}

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_INDEX = "model.safetensors.index.json"
_WANTED = ["*.json", "*.txt", "model*.safetensors"]


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder; every problem is a one-line `CheckpointError` that names it."""

    source: str
    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, source: str | Path) -> ModelFolder:
        """``source``: a folder, or a hub id, ``org/name`` or ``org/name@revision``."""
        path = _located(str(source))
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{source}: no config.json; need a transformers model folder or a hub id"
            )
        return cls(str(source), path, _read_json(path / "config.json", str(source)))

    @property
    def kind(self) -> str:
        """``model_type`` of config.json."""
        return str(self.config.get("model_type"))

    def require(self, kind: str, parts: Collection[str], needed: str) -> None:
        """Refuse a folder of another ``model_type``, or with no tensor below one of ``parts``, or a
        BLIP with a tensor that belongs to none of its parts; what is below a part, `part` checks.

        ``needed`` says in words what it should be.
        """
        found, advice = f"found model_type '{self.kind}'", f"need {needed}"
        if self.kind != kind:
            raise CheckpointError(
                f"{self.source}: {found}, {advice} (model_type '{kind}'); give its folder or hub id"
            )
        for part in parts:
            if not any(name.startswith(part) for name in self.names):
                raise CheckpointError(
                    f"{self.source}: {found} without any tensor '{part}*', {advice}; "
                    "give its folder or hub id"
                )
        known = self.names if kind != "blip" else _BLIP_TENSORS
        stray = [n for n in self.names if n not in known and not n.startswith(_BLIP_PARTS)]
        if stray:
            raise CheckpointError(
                f"{self.source}: unexpected tensor {stray[0]} ({len(stray)} such), {advice}; "
                "give its folder or hub id"
            )

    @cached_property
    def names(self) -> dict[str, Path]:
        """Every tensor's name and the safetensors file that holds it."""
        from safetensors import SafetensorError, safe_open

        files = [self.path / "model.safetensors"]
        if (self.path / _INDEX).is_file():
            index = _read_json(self.path / _INDEX, self.source).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError(f"{self.source}: {_INDEX} names no files of weights")
            files = [self.path / Path(name).name for name in sorted(set(index.values()))]
        names: dict[str, Path] = {}
        for file in files:
            if not file.is_file():
                pickled = any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*"))
                why = "; pickled weights are never opened, save them as safetensors" * pickled
                raise CheckpointError(f"{self.source}: no {file.name}{why}")
            try:
                with safe_open(file, framework="pt") as stored:
                    names.update(dict.fromkeys(stored.keys(), file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.source}: {file.name} is not safetensors: {one_line(error)}"
                ) from error
        return names

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, by the rest of their names."""
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        wanted = {name: file for name, file in self.names.items() if name.startswith(prefix)}
        for file in sorted(set(wanted.values())):
            with safe_open(file, framework="pt") as stored:
                for name in (name for name, at in wanted.items() if at == file):
                    found[name.removeprefix(prefix)] = stored.get_tensor(name)
        return found

    def part(
        self,
        build: Callable[[], M],
        prefix: str,
        *,
        ignored: tuple[str, ...] = (),
        tied: Mapping[str, Tensor] | None = None,
    ) -> M:
        """The module that ``build`` makes, with the tensors below ``prefix``, ready for inference.

        ``ignored``: starts of names that may be there and are not needed. ``tied``: tensors that
        take precedence over the file's. A missing, unexpected or misshapen tensor is refused.
        """
        with shapes_only():
            module = build()
        return self.fill(module, prefix, ignored=ignored, tied=tied)

    def fill(
        self,
        module: M,
        prefix: str,
        *,
        ignored: tuple[str, ...] = (),
        tied: Mapping[str, Tensor] | None = None,
    ) -> M:
        """`part` for a module that is there already."""
        tensors = {
            name: tensor
            for name, tensor in self.tensors(prefix).items()
            if not name.startswith(ignored) and not name.endswith("embeddings.position_ids")
        }
        tensors |= tied or {}
        advice = "the weights do not fit config.json, save the model again or give another"
        check_tensors(self.source, tensors, module.state_dict(), advice, prefix)
        module.load_state_dict(tensors, assign=True)
        return module.eval().requires_grad_(False)

    def linear(self, prefix: str, inputs: int, outputs: int) -> nn.Linear:
        """`part` for a head of these sizes, in float32 whatever the towers' numbers: it costs
        nothing, and rounded to bfloat16 a matching probability near 0.5 goes in steps of 0.002."""
        return self.part(lambda: nn.Linear(inputs, outputs), prefix).float()

    def blip(self) -> tuple[VisionConfig, TextConfig, int]:
        """Sizes of a BLIP folder: vision tower, text stack, width of the contrastive space.

        Token ids other than padding are the tokenizer's: see `text.fitted_to`.
        """
        from pydantic import ValidationError
        from transformers import BlipConfig

        try:
            config = BlipConfig.from_pretrained(self.path)
            vision: Any = config.vision_config
            text: Any = config.text_config
            for part in (vision, text):
                if part.hidden_act != "gelu":
                    raise ValueError(f"hidden_act '{part.hidden_act}', only 'gelu' is known")
            return _vision_config(vision), _text_config(text, vision), config.image_text_hidden_size
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "sizes"
            raise CheckpointError(f"{self.source}: config.json: {where}: {first['msg']}") from error
        except config_errors() as error:
            raise CheckpointError(f"{self.source}: config.json: {one_line(error)}") from error

    def tokenizer(self) -> BertTokenizer:
        """The tokenizer of a BLIP folder; refused where it is not the model's own."""
        tokenizer, expected = load_tokenizer(self.path), self.blip()[1].vocab_size
        if len(tokenizer) != expected:
            raise CheckpointError(
                f"{self.source}: the tokenizer has {len(tokenizer)} tokens, config.json says "
                f"{expected}; need the tokenizer that the model was trained with"
            )
        return tokenizer

    def preprocessing(self, size: int, *, crop: bool) -> Preprocessing:
        """The folder's image processor settings, for a model that takes ``size`` pixels.

        ``crop``: whether this kind of model cuts out the centre unless the settings say otherwise.
        """
        settings: dict[str, Any] = {}
        if (self.path / "preprocessor_config.json").is_file():
            settings = _read_json(self.path / "preprocessor_config.json", self.source)
        elif (self.path / "processor_config.json").is_file():
            whole = _read_json(self.path / "processor_config.json", self.source)
            settings = whole.get("image_processor", {})
        try:
            return Preprocessing.of(settings, size=size, crop=crop)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.source}: image processor config: {one_line(error)}"
            ) from error


def check_tensors(
    source: str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    advice: str,
    prefix: str = "",
) -> None:
    """Refuse a missing, unexpected or misshapen tensor, naming the first and what to do.

    ``prefix`` stands before every name in the complaint.
    """
    shapes = {n: t.shape for n, t in tensors.items()}
    problems = {
        "no tensor": [n for n in wanted if n not in shapes],
        "unexpected tensor": [n for n in shapes if n not in wanted],
        "misshapen tensor": [n for n in wanted if n in shapes and shapes[n] != wanted[n].shape],
    }
    for problem, names in problems.items():
        if names:
            first, count = names[0], len(names)
            sizes = ""
            if problem == "misshapen tensor":
                sizes = f" {tuple(shapes[first])}, needs {tuple(wanted[first].shape)}"
            raise CheckpointError(
                f"{source}: {problem} {prefix}{first}{sizes} ({count} such); {advice}"
            )


def _vision_config(vision: Any) -> VisionConfig:
    return VisionConfig(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        eps=vision.layer_norm_eps,
    )


def _text_config(text: Any, vision: Any) -> TextConfig:
    fallback = TextConfig()
    return TextConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        mlp_width=text.intermediate_size,
        max_positions=text.max_position_embeddings,
        vision_width=vision.hidden_size,
        eps=text.layer_norm_eps,
        dropout=text.hidden_dropout_prob,
        pad_token_id=fallback.pad_token_id if text.pad_token_id is None else text.pad_token_id,
    )


def _located(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith(".") or path.exists():
        raise CheckpointError(f"{source}: no such folder, and not a hub id like 'org/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, revision = match["name"], match["revision"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no such folder, and not to be had from the hub: {one_line(error)}"
        ) from error


def _read_json(file: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: cannot read {file.name}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {file.name} does not hold a JSON object")
    return value


def config_errors() -> tuple[type[Exception], ...]:
    """What transformers raises over a config.json that it cannot take."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError, ValueError, TypeError, AttributeError, OSError


def one_line(error: Exception) -> str:
    """What ``error`` says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
