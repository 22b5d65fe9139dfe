"""YAML in which a key that stands twice is an error: PyYAML keeps the last, without a word."""

from __future__ import annotations

from typing import Any

import yaml

from stages.errors import ConfigError


def read_yaml(text: str, where: str) -> Any:
    """The plain values of one YAML document. ``where`` names its origin in errors.

    Raises:
        ConfigError: a mapping, however deep, has the same key twice.
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where the mapping is constructed: by then ``<<`` has added keys to it, which
        # those of its own may replace.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, known = key.start_mark.line + 1, (key.tag, key.value)
                if known in first:
                    raise ConfigError(
                        f"{self.name}: line {line}: {key.value!r} stands on line {first[known]} "
                        "already; put both into one"
                    )
                first[known] = line
        return node
