"""Reads a settings file as text: one ``key: value`` per line, each with its comment."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from run.errors import UserError

# Where YAML 1.1, and so a node's mark, begins a new line. Reading has turned "\r" into "\n".
YAML_LINE_END = "[\n\x85\u2028\u2029]"


@dataclass(frozen=True)
class SettingsFile:
    """The content of one settings file, not interpreted.

    Attributes:
        values: the value of each key, as text.
        comments: what follows it on its line.
        problems: descriptions of what is not a setting.
    """

    values: dict[str, str]
    comments: dict[str, str]
    problems: list[str]


def read_settings_file(file: Path) -> SettingsFile:
    """Raises UserError if ``file`` can't be read, or is not a YAML mapping."""
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(
            f"{file}: can't be read ({error.strerror}); name a settings file with --config FILE"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: is not UTF-8 text; name a settings file with --config FILE"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"{file}: is not valid YAML ({error}); write one 'key: value' per line"
        ) from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}: contains no settings; write one 'key: value' per line")
    lines = re.split(YAML_LINE_END, text)
    content = SettingsFile({}, {}, [])
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not isinstance(value_node, yaml.ScalarNode):
            content.problems.append(f"line {line}: a setting is one value, not a list or a mapping")
        elif key in content.values:
            content.problems.append(f"{key} is set twice (again on line {line}): keep one")
        else:
            content.values[key] = value_node.value
            rest = lines[value_node.end_mark.line][value_node.end_mark.column :].strip()
            content.comments[key] = rest.removeprefix("#").strip()
    return content
