"""Before a run writes anything: can what its config names be used?

Everything here would come to light later too, some of it after hours of training. The first row
of every source is read, every model is opened, every probe set is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.config import RunConfig
from stages.dedup.contamination import check_evaluation
from stages.errors import CapfiltError, ConfigError
from stages.ingest import check_source
from stages.probes import read_probes


def check(config: RunConfig, sources: bool = True) -> None:
    """Open all that ``config`` names, but for the sample world, which the run itself makes, and
    look where the run folder lies.

    Args:
        sources: also the sources; a run that has cut all it needs can do without them.

    Raises:
        UserError: naming the field, what it names and what is wrong there.
    """
    check_stays(config.run)
    if sources:
        check_sources(config)
    check_models(config)


def check_sources(config: RunConfig, awaited: bool = False) -> list[str]:
    """Read the first row of every source.

    Args:
        awaited: files may still come to ``sources``: a folder or a pattern with none is no error.

    Returns:
        The fields of such sources.

    Raises:
        SourceError: naming the field, what it names and what is wrong there.
    """
    empty = []
    for origin, given in (("sources", config.sources), ("human", config.human)):
        for number, source in enumerate(given):
            if _made(source.path):
                continue
            with _field(field := f"{origin}.{number}.path"):
                human = origin == "human"
                if not check_source(source, "human" if human else "web", awaited and not human):
                    empty.append(field)
    return empty


def check_models(config: RunConfig) -> None:
    """Parse the probe sets, look for a picture in the evaluation sets, and open the models.
    Raises as `check`."""
    for split, folder in (("dev", config.dev), ("test", config.test)):
        if folder is not None and not _made(folder):
            with _field(split):
                read_probes(Path(folder))
    for number, path in enumerate(config.dedup.evaluation):
        if not _made(path):
            with _field(f"dedup.evaluation.{number}"):
                check_evaluation(Path(path))
    for field, ref, use in _models(config):
        if not _made(ref):
            with _field(field):
                use(ref)


def check_stays(run: str) -> None:
    """Raises ConfigError for a run folder that Ray would delete: one in its copy of the
    ``--working-dir`` of a job, where relative paths lead."""
    if "://" not in run and "working_dir_files" in Path(run).absolute().parts:
        raise ConfigError(
            f"run: {run!r} would lie in this job's copy of its working directory, which Ray "
            "deletes; give a full path that all machines share, or an s3:// or gs:// URL"
        )


def _made(path: str) -> bool:
    """Whether the sample world will hold it; without a world, `RunConfig` refuses such a path."""
    return "{world}" in path


@contextmanager
def _field(name: str) -> Iterator[None]:
    """Put the config field before what is said of its value."""
    try:
        yield
    except CapfiltError as error:
        raise type(error)(f"{name}: {error}") from error


def _models(config: RunConfig) -> Iterator[tuple[str, str, Callable[[str], object]]]:
    """(field, folder or hub id, what opens it), one at a time: nothing stays in memory."""
    from stages.models.captioner import Captioner
    from stages.models.embedder import Embedder
    from stages.models.matcher import Matcher
    from stages.models.text import load_tokenizer

    yield "pretrain.tokenizer", config.pretrain.tokenizer, load_tokenizer
    yield from _inits(config)
    if config.caption.model is not None:
        generation = config.caption.generation
        yield (
            "caption.model",
            config.caption.model,
            lambda ref: Captioner(ref).prompt_ids(generation),
        )
    if config.filter.model is not None:
        longest = config.filter.max_tokens
        yield "filter.model", config.filter.model, lambda ref: Matcher(ref, max_tokens=longest)
    if config.embed.model is not None:
        yield "embed.model", config.embed.model, Embedder


def _inits(config: RunConfig) -> Iterator[tuple[str, str, Callable[[str], object]]]:
    from stages.models.checkpoints import check_patches, load_med
    from stages.models.text import fitted_to, load_tokenizer
    from stages.models.towers import text_start, vision_start

    pretrain = config.pretrain
    if pretrain.init is not None:
        yield "pretrain.init", pretrain.init, lambda ref: load_med(ref, pretrain.model)
        for name in ("captioner", "filter"):
            size = getattr(config.finetune, name).image_size
            yield f"finetune.{name}", pretrain.init, partial(check_patches, size=size)
    if pretrain.init_vision is not None:
        vision = pretrain.model.vision
        yield "pretrain.init_vision", pretrain.init_vision, lambda ref: vision_start(ref, vision)
    if pretrain.init_text is not None and not _made(pretrain.tokenizer):
        words = load_tokenizer(pretrain.tokenizer)
        text = fitted_to(pretrain.model.text, words)
        yield "pretrain.init_text", pretrain.init_text, lambda ref: text_start(ref, text, words)
