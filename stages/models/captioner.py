"""BLIP's captioner: n texts for each image, by nucleus sampling, beam search or greedily.

    from PIL import Image
    from stages.models.captioner import Captioner

    captioner = Captioner("Salesforce/blip-image-captioning-base")
    print(captioner([Image.open("cat.jpg")]))

Opens unchanged transformers folders. An image is encoded once, and its cross-attention keys and
values are computed once, for all of its captions and all decoding steps, or not at all where few
queries read them; self-attention keys and values are cached; an image leaves the batch when all of
its captions are finished, of which the first ones decode padding until then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from stages.errors import ConfigError
from stages.models.absorbed import few_queries
from stages.models.base import InferenceModel
from stages.models.blocks import LMHead, TextStack
from stages.models.config import GenerationConfig, TextConfig
from stages.models.decoding import Decoding, GraphedDecoding, compacted
from stages.models.folders import ModelFolder
from stages.models.sampling import NOT_FINITE, Beams, Rules, Samples, uniforms
from stages.models.text import fitted_to
from stages.models.vision import VisionTransformer


class Captioner(InferenceModel):
    """An image captioner over a `BlipForConditionalGeneration` folder or hub id.

    With equal ``batch_size``, device and thread count the same images give the same captions, in
    any process and on any retry. Sampling noise belongs to the image, not to its place, so other
    batches change a caption only where a rounding of the last bit moves a token's border. In
    bfloat16 that bit is coarse: logits between 8 and 16 lie 1/16 apart, so that words of nearly
    equal chances become equal, and which of them is the last of the ``top_k`` is left to torch.
    Of 600 captions of a trained captioner, none differed between batches of 16 and of 5, in float32
    or in bfloat16; int8 changed 22 (`tests/bench/capfilt.py`, ``--exact``).

    Raises `CheckpointError` where the folder holds no BLIP captioner.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        int8: bool = False,
    ) -> None:
        super().__init__(device, dtype, batch_size, int8)
        folder = ModelFolder.open(model)
        needed = "a BLIP captioner (BlipForConditionalGeneration)"
        folder.require("blip", ("vision_model.", "text_decoder."), needed)
        vision, text, _ = folder.blip()
        self.tokenizer = folder.tokenizer()
        self.preprocessing = folder.preprocessing(vision.image_size, crop=False)
        text = fitted_to(text, self.tokenizer)
        decoder = folder.part(lambda: TextStack(text), "text_decoder.bert.", ignored=("pooler.",))
        head = _head(folder, text, decoder)
        # bfloat16 and int8 make keys and values fast where they are fast at all; on a GPU products
        # are fast, and graphs need what they read in one place.
        self.absorbs = self.device.type == "cpu" and dtype == torch.float32 and not int8
        if self.absorbs:
            decoder.absorb()
        self.vision = self.place(folder.part(lambda: VisionTransformer(vision), "vision_model."))
        self.decoder, self.head = self.place(decoder), self.place(head)
        self.graphed = self.device.type == "cuda"
        self._graphs: GraphedDecoding | None = None

    def __call__(
        self,
        images: Sequence[Image.Image] | Tensor,
        keys: Sequence[bytes] | None = None,
        config: GenerationConfig | None = None,
    ) -> list[list[str | None]]:
        """``captions_per_image`` texts for each image, in order, the prompt taken off.

        ``images``: any mode and size, turned as their EXIF says; or what `preprocessing` makes of
        them. ``keys``: what each image's noise hangs on, its file's sha256; None = the sha256 of
        its pixels as given. Beam search gives its best captions, best first. A caption is
        None where the model's logits are not finite, which harms no other image. Raises
        `ConfigError` where ``config`` does not fit the model, `ValueError` where there are not as
        many keys as images.
        """
        config = config or GenerationConfig()
        prompt = self.prompt_ids(config)
        if keys is not None and len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images; give one for each")

        def run(pixels: Tensor, part: slice) -> list[list[list[int]]]:
            own = keys[part] if keys is not None else _keys_of(images[part], config)
            return cast(list[list[list[int]]], self.generate(pixels, own, config).tolist())

        batches = self.over(images, run)
        return [[self._text(row, len(prompt)) for row in rows] for ids in batches for rows in ids]

    def prompt_ids(self, config: GenerationConfig) -> list[int]:
        """[DEC] and the prompt's tokens; `ConfigError` where no caption fits behind them."""
        text = self.decoder.config
        tokens = self.tokenizer.encode(config.prompt, add_special_tokens=False)
        ids = [text.dec_token_id, *tokens]
        if len(ids) >= config.max_tokens:
            raise ConfigError(
                f"max_tokens {config.max_tokens} leaves no room behind the prompt "
                f"{config.prompt!r}, which takes {len(ids)}; raise it or shorten the prompt"
            )
        if config.max_tokens > text.max_positions:
            raise ConfigError(
                f"max_tokens {config.max_tokens} exceeds the model's {text.max_positions} positions"
            )
        return ids

    @torch.inference_mode()
    def generate(self, pixels: Tensor, keys: Sequence[bytes], config: GenerationConfig) -> Tensor:
        """Token ids (B, captions, max_tokens) int64 on the CPU: prompt, caption, [SEP], padding;
        `NOT_FINITE` all through where the model's logits are not.

        ``pixels``: (B, 3, S, S) floats, one batch.
        """
        tokens = self.vision(pixels.to(self.device, self.dtype))
        search = self._search(keys, config)
        decoding = self._decoding(tokens, *search.ids.shape[1:])
        order = torch.arange(len(pixels))
        result = torch.empty(search.ids.shape, dtype=torch.int64)
        logits = decoding.start(search.ids[0, 0, : search.length])
        while True:
            source = search.step(logits)
            going = search.going.cpu()
            if not going.all():
                ended = (~going).nonzero()[:, 0]
                result[order[ended]] = search.results()[ended.to(self.device)].cpu()
            if not going.any():
                return result[:, : config.captions_per_image]
            if source is not None:
                decoding.reorder(source)
            if not going.all():
                kept = compacted(going)
                search.keep(kept.to(self.device))
                decoding.keep(kept.to(self.device))
                order = order[kept]
            logits = decoding.step(search.last)

    def _decoding(self, tokens: Tensor, width: int, capacity: int) -> Decoding:
        """``tokens``: (B, T, Dv) of the images; they may be overwritten."""
        few = width * capacity <= few_queries(tokens.shape[1], self.decoder.config)
        if few and self.absorbs and not self.graphed:
            return Decoding(self.decoder, self.head, tokens, width, capacity)
        image_kv = self.decoder.cross_kv(tokens)
        if not self.graphed:
            return Decoding(self.decoder, self.head, image_kv, width, capacity)
        graphs, shape = self._graphs, (width, capacity)
        if graphs is None or (graphs.width, graphs.capacity) != shape or graphs.slots < len(tokens):
            self._graphs = None  # its buffers must go before the new ones come
            slots = max(len(tokens), self.batch_size)
            graphs = self._graphs = GraphedDecoding(self.decoder, self.head, slots, *shape)
        graphs.begin(image_kv)
        return graphs

    def release(self) -> None:
        self._graphs = None
        super().release()

    def _search(self, keys: Sequence[bytes], config: GenerationConfig) -> Samples | Beams:
        text = self.decoder.config
        prompt = torch.tensor(self.prompt_ids(config), device=self.device)
        rules = Rules(
            min_tokens=config.min_tokens,
            max_tokens=config.max_tokens,
            penalty=config.penalty,
            eos=text.sep_token_id,
            pad=text.pad_token_id,
        )
        if config.method == "beam":
            return Beams(prompt, len(keys), config.num_beams, rules)
        captions, steps = config.captions_per_image, config.max_tokens
        if config.method == "greedy":
            noise = torch.zeros(len(keys), captions, steps, dtype=torch.float64)
            return Samples(prompt, noise.to(self.device), rules, nucleus=None)
        noise = torch.from_numpy(uniforms(config.seed, keys, captions, steps))
        nucleus = config.top_k, config.top_p
        return Samples(prompt, noise.to(self.device), rules, nucleus=nucleus)

    def _text(self, ids: list[int], prompt_length: int) -> str | None:
        """The caption without its prompt; a word piece that continues the prompt loses its ##."""
        if ids[0] == NOT_FINITE:
            return None
        end = self.decoder.config.sep_token_id
        caption = ids[prompt_length:]
        caption = caption[: caption.index(end)] if end in caption else caption
        self.tokens += len(caption)
        return (
            str(self.tokenizer.decode(caption, skip_special_tokens=True)).removeprefix("##").strip()
        )


def _keys_of(images: Sequence[Image.Image] | Tensor, config: GenerationConfig) -> list[bytes]:
    """sha256 of each image's pixels, where noise is drawn at all."""
    if config.method != "nucleus":
        return [b""] * len(images)
    return [
        hashlib.sha256(i.cpu().numpy().tobytes() if isinstance(i, Tensor) else i.tobytes()).digest()
        for i in images
    ]


def _head(folder: ModelFolder, text: TextConfig, decoder: TextStack) -> LMHead:
    """The language head, tied as transformers ties it: files may hold either name, or both."""
    prefix, words = "text_decoder.cls.predictions.", decoder.embeddings.word_embeddings
    tied = {"decoder.weight": words.weight}
    stored = folder.tensors(prefix)
    for name, other in (("bias", "decoder.bias"), ("decoder.bias", "bias")):
        if name not in stored and other in stored:
            tied[name] = stored[other]
    return folder.part(lambda: LMHead(text, words), prefix, tied=tied)
