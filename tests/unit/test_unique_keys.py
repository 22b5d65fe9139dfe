"""YAML in which a key that stands twice is an error; of whole configs, see test_config.py."""

from __future__ import annotations

import pytest
import yaml

from pipeline.unique_keys import read_yaml
from stages.errors import ConfigError

MERGED = """
embed: &model {model: a/b, threads: 1}
finetune: {captioner: &deep {<<: *model, threads: 2}}
caption: {<<: *deep, model: c/d}
filter: {<<: [*model, *deep]}
"""


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^my\.yaml: line 3: 'b' stands on line 2 already; put"):
        read_yaml("a: 1\nc: {b: 1,\n  b: 1}\n", "my.yaml")
    assert read_yaml("1: a\n'1': b\nx: {1: c}\n", "my.yaml") == {1: "a", "1": "b", "x": {1: "c"}}


def test_what_is_merged_may_be_given_anew() -> None:
    """Deep mappings are constructed after shallow ones, which have merged them by then."""
    values = read_yaml(MERGED, "my.yaml")
    assert values["finetune"]["captioner"] == {"model": "a/b", "threads": 2}
    assert values["caption"] == {"model": "c/d", "threads": 2}
    assert values["filter"] == {"model": "a/b", "threads": 1}


def test_what_is_no_yaml_or_not_safe_stays_so() -> None:
    for text in ("a: [1\nb: 2\n", "!!python/object/apply:os.system ['true']\n"):
        with pytest.raises(yaml.YAMLError):
            read_yaml(text, "my.yaml")
