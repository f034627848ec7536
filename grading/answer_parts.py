"""The parts of an answer in GSM8K's notation, by which its tokens are told apart.

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    #### 24

The equations are the annotations, ``<<48/2=24>>`` with its brackets. The final answer begins with
``####``, and EOS belongs to it. All else is reasoning: the words, the line ends, what is written
before an annotation (``48/2 = ``), and its result, which is written again after it (``24``).
"""

import re
from collections.abc import Sequence

PARTS = ("reasoning", "equations", "final_answer")
_ANNOTATION = re.compile(r"<<[^\n]*?>>")  # even one without a value, which a model must write too


def part_of_each(answer: str) -> bytes:
    """The number in `PARTS` of each character of ``answer``, and of EOS after the last one."""
    parts = bytearray(len(answer) + 1)
    for annotation in _ANNOTATION.finditer(answer):
        start, end = annotation.span()
        parts[start:end] = bytes([PARTS.index("equations")]) * (end - start)
    mark = answer.rfind("####")
    start = mark if mark >= 0 else len(answer)
    parts[start:] = bytes([PARTS.index("final_answer")]) * (len(parts) - start)
    return bytes(parts)


def classes_of(answer: str, length: int, starts: Sequence[int]) -> list[int]:
    """The number in `PARTS` of each token of an answer, and of the EOS after them.

    A token that writes the end of one part and the beginning of the next belongs to the part of its
    first character.

    Args:
        length: of the text that ends in ``answer``.
        starts: where in that text each token begins. The first one may also write the separator
            before the answer, which is no part of it.
    """
    parts, begin = part_of_each(answer), length - len(answer)
    return [parts[max(start - begin, 0)] for start in starts] + [parts[-1]]
