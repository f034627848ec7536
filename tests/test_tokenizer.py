"""Ids are the vocabulary file's, no text is lost, and other programs read the same ids."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROMPT, flags, seal
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import data
import evaluate
import perplexity
import standin
import train
from engine import many_texts
from engine.loading import load_tokenizer
from engine.sentencepiece_bpe import PROBES, disagreement
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import made_without_scores, read_files
from grading.dataset import Problem
from run.errors import UserError
from run.files import forget_what_was_said
from run.training_json import tokenizer_record


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts full of what tokenizers disagree on: blanks, line ends, digits, rare signs."""
    rng = random.Random(seed)
    parts = [" " * count for count in range(1, 20)]
    parts += ["\n", "\n\n", "\t", "12", "1,450", "<<3+4=7>>", "####", "’", "½", "七"]
    parts += ["Question:", "Answer:", "How", "many", "apples", "does", "she", "x", "."]
    parts += ["</s>", "<unk>", "e\u0301", "€"]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 30))) for _ in range(count)]


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def sentencepiece_folder(folder: Path, corpus: list[str], **settings: object) -> Path:
    folder.mkdir()
    asked = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "split_digits": True}
    asked |= {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        num_threads=1,
        **(asked | settings),
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture
def corpus(problems: list[Problem]) -> list[str]:
    return [line for p in problems for line in f"{p.question}\n{p.answer}".split("\n") if line]


# ---------------------------------------------------------------- which ids


def test_a_tokenizer_model_has_the_ids_of_sentencepiece(tokenizer_folder: Path) -> None:
    """Guards against merges that ignore the vocabulary's scores, and a lost first blank."""
    tokenizer = load_tokenizer(tokenizer_folder)
    reference = SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    for text in [*texts(500), *PROBES, " x", "  x", "\n", ""]:
        assert tokenizer.ids_of([text]) == [reference.encode(text)], text


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<pre>", "####"]},
        {"allow_whitespace_only_pieces": True, "vocab_size": 500},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=["no first blank", "symbols of its own", "runs of blanks", "normalised"],
)
def test_other_kinds_of_sentencepiece_models(
    tmp_path: Path, corpus: list[str], settings: dict[str, object]
) -> None:
    folder = sentencepiece_folder(
        tmp_path / "other", [*corpus, "a" + " " * 9 + "b"] * 3, **settings
    )
    tokenizer = load_tokenizer(folder)
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (f"x{text}" for text in [*corpus[:50], *texts(200)]):
        assert tokenizer.ids_of([text]) == [reference.encode(text)], text
    for ids in (reference.encode(" Two  blanks"), reference.encode("x")):
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_what_a_tokenizer_json_cuts_and_pads_is_whole(
    tmp_path: Path, tokenizer_folder: Path, corpus: list[str]
) -> None:
    """Guards against rows without their end, or that are refused for it."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.save(tmp_path)
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 600}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}
    edit(tmp_path / "tokenizer.json", lambda content: content.update(truncation=cut, padding=pad))
    assert load_tokenizer(tmp_path).encode(corpus[:9]) == tokenizer.encode(corpus[:9])


def test_a_unigram_model_is_refused(tmp_path: Path, corpus: list[str]) -> None:
    """Of two equally probable segmentations the tokenizers library may choose the other one."""
    folder = sentencepiece_folder(
        tmp_path / "plain", corpus * 3, model_type="unigram", vocab_size=380
    )
    with pytest.raises(
        UserError, match=r"can't reproduce the ids of its tokenizer.model \(not of type BPE"
    ):
        load_tokenizer(folder)


def rewrite_scores(folder: Path, score: Callable[[str, float], float]) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    for piece in proto.pieces:
        piece.score = score(piece.piece, piece.score)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def with_blanks_merged_last(folder: Path, corpus: list[str], vocab_size: int = 420) -> Path:
    """As in Llama-2: runs of blanks come early in the vocabulary, but are merged last.

    A quarter of GSM8K's rows depends on it.
    """
    standin.make_tokenizer(corpus, folder, vocab_size)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    pieces = list(proto.pieces)
    merged = [
        number for number, piece in enumerate(pieces) if piece.type == 1 and len(piece.piece) > 1
    ]
    blanks = pieces.pop(
        next((number for number in merged if pieces[number].piece == "▁▁"), merged[-1])
    )
    blanks.piece, blanks.score = "▁▁", -1e9
    del proto.pieces[:]
    proto.pieces.extend([*pieces[:259], blanks, *pieces[259:]])
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def test_scores_that_do_not_follow_the_vocabulary_count(tmp_path: Path, corpus: list[str]) -> None:
    folder = with_blanks_merged_last(tmp_path / "scored", corpus)
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "week.  How many"
    [ids] = load_tokenizer(folder).ids_of([text])
    assert ids == reference.encode(text)
    theirs = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    assert ids != theirs, "Transformers now reads it correctly: is all of this still needed?"


def test_ids_that_cannot_be_had_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Pieces with equal scores, as in two joined vocabularies, are merged from the left."""
    shutil.copytree(tokenizer_folder, folder := tmp_path / "joined")
    rewrite_scores(folder, lambda piece, score: 0.0)
    with pytest.raises(
        UserError, match=r"tokenizers library can't reproduce the ids of its tokenizer\.model \("
    ):
        load_tokenizer(folder).encode(["How many apples does she have?"])


def byte_level(folder: Path, corpus: list[str], **config: object) -> Path:
    """A tokenizer.json like Llama-3's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    settings |= {"eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize(
    "kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"]
)
def test_a_tokenizer_json_has_its_own_ids(tmp_path: Path, corpus: list[str], kind: str) -> None:
    """Guards against a class name for which Transformers builds another tokenizer.

    The export must guard against it too.
    """
    folder = byte_level(tmp_path / "bytes", corpus, tokenizer_class=kind)
    tokenizer, own = load_tokenizer(folder), Backend.from_file(str(folder / "tokenizer.json"))
    wanted = [own.encode(text, add_special_tokens=False).ids for text in texts(100)]
    assert tokenizer.ids_of(texts(100)) == tokenizer.encode(texts(100)) == wanted
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    tokenizer.save(tmp_path / "saved")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")(
            texts(100), add_special_tokens=False
        ).input_ids
        == wanted
    )


def test_rules_of_a_tokenizer_json_outlive_its_class(tmp_path: Path, model_folder: Path) -> None:
    """Transformers' LlamaTokenizer uses its vocabulary and merges, and ignores its other rules."""
    shutil.copytree(model_folder, folder := tmp_path / "ruled")
    (folder / "tokenizer.model").unlink()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Punctuation()
    backend.save(str(folder / "tokenizer.json"))
    some = [f"x{text}".replace("</s>", "").replace("<unk>", "") for text in texts(100)]
    wanted = [backend.encode(text, add_special_tokens=False).ids for text in some]
    assert AutoTokenizer.from_pretrained(folder)(some, add_special_tokens=False).input_ids != wanted
    tokenizer = load_tokenizer(folder)
    assert tokenizer.ids_of(some) == wanted
    tokenizer.save(folder)
    assert AutoTokenizer.from_pretrained(folder)(some, add_special_tokens=False).input_ids == wanted


def sort_merges(folder: Path) -> None:
    def sort(content: dict) -> None:
        merges = content["model"]["merges"]
        merges.sort()

    edit(folder / "tokenizer.json", sort)


def swap_tokens(folder: Path) -> None:
    def swap(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        one, other = list(vocabulary)[300:302]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit(folder / "tokenizer.json", swap)


@pytest.mark.parametrize("damage", [sort_merges, swap_tokens])
def test_two_vocabulary_files_that_disagree_are_refused(
    call, settings: dict[str, str], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(settings["model"], folder := tmp_path / "two")
    assert load_tokenizer(folder)
    damage(folder)
    outcome = call(train, *flags(settings | {"model": str(folder)}))
    outcome.assert_user_error(
        "its tokenizer.json and its tokenizer.model disagree (", "remove the one"
    )
    for name in ("tokenizer.json", "tokenizer.model"):  # each alone is a tokenizer
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        load_tokenizer(tmp_path / name)


class BreakingTokenizer(Tokenizer):
    """A tokenizer that reads every text correctly until its ``fault`` is set."""

    fault: Callable[[list[int]], list[int]] | None = None

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        ids = super().ids_of(texts)
        return [self.fault(one) for one in ids] if self.fault else ids


def test_rows_are_compared_too(tokenizer_folder: Path) -> None:
    """Guards against a disagreement that no probe shows."""
    tokenizer = BreakingTokenizer(read_files(tokenizer_folder), str(tokenizer_folder))
    [ids] = tokenizer.encode(["How many?"])
    tokenizer.fault = lambda ids: [*ids, *ids]
    with pytest.raises(UserError, match="loses text"):
        tokenizer.encode(["How many?"])
    # The same text in pieces of one sign each: only SentencePiece's ids are others.
    pieces = {tokenizer.piece(index): index for index in range(len(tokenizer))}
    signs = [pieces[sign] for index in ids for sign in tokenizer.piece(index)]
    assert signs != ids and tokenizer.decode(signs) == "How many?"
    tokenizer.fault = lambda ids: signs
    with pytest.raises(UserError, match=r"can't reproduce the ids of its tokenizer\.model \("):
        tokenizer.encode(["How many?"])


class CountingLibrary:
    """A library's tokenizer that counts the texts of each call."""

    def __init__(self, library: object):
        self.library, self.calls = library, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.library, name)

    def _counted(self, name: str, texts: list[str], **options: object) -> list:
        self.calls.append(len(texts))
        return getattr(self.library, name)(texts, **options)

    def encode(self, texts: list[str]) -> list:
        return self._counted("encode", texts)

    def encode_batch(self, texts: list[str], **options: object) -> list:
        return self._counted("encode_batch", texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: object) -> list:
        return self._counted("encode_batch_fast", texts, **options)


def test_many_texts_are_encoded_in_parts_and_equal_ones_once(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against gigabytes and half a minute for the 88,000 rows of augmented data."""
    tokenizer = load_tokenizer(tokenizer_folder)
    some = [text for text in texts(20) for _ in range(3)]
    wanted = [tokenizer.ids_of([text])[0] for text in some]
    starts = [tokenizer.starts_of([text])[0] for text in some]
    ours = tokenizer._backend = CountingLibrary(tokenizer._backend)
    theirs = CountingLibrary(SentencePieceProcessor(str(tokenizer_folder / "tokenizer.model")))
    monkeypatch.setattr(many_texts, "AT_ONCE", 8)
    found = tokenizer.ids_of(some)
    assert found == wanted and ours.calls == [8, 8, 4]
    ours.calls.clear()
    assert tokenizer.starts_of(some) == starts and ours.calls == [8] * 7 + [4]
    assert not disagreement(theirs, some, found) and theirs.calls == [8] * 7 + [4]
    assert found[0] is found[1]
    # A row takes 8 bytes a token, not 32 more for a number of its own.
    numbers = [index for ids in found for index in ids]
    assert len({id(index) for index in numbers}) == len(set(numbers)) < len(numbers)
    changed = [*found[:-1], [*found[-1], found[-1][0]]]  # in the last part
    assert disagreement(theirs, some, changed)


def test_a_checkpoint_keeps_the_ids_that_it_was_trained_on(
    call, settings: dict[str, str], make_llama, corpus: list[str], tmp_path: Path
) -> None:
    """As older versions saved it: a tokenizer.json alone, with Transformers' own merges."""
    tokenizer_folder = with_blanks_merged_last(tmp_path / "base", corpus, 600)
    make_llama(600).save_pretrained(tokenizer_folder)
    settings["model"] = str(tokenizer_folder)
    assert call(train, *flags(settings)).code == 0
    best = Path(settings["output_dir"]) / "test" / "best"
    assert "trained" not in call(perplexity, "--ckpt", str(best)).out
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (best / name).unlink()
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs.save_pretrained(best)
    edit(best / "training.json", lambda content: content.pop("tokenizer"))
    seal(best)
    assert made_without_scores(read_files(best))
    outcome = call(perplexity, "--ckpt", str(best))
    assert outcome.code == 0
    assert "was trained by an older version" in outcome.out
    assert "with ids that may not be SentencePiece's; they are kept" in outcome.out
    some = [f"x{text}" for text in texts(300)]
    kept = load_tokenizer(best, tokenizer_record(best)).ids_of(some)
    assert kept == theirs(some, add_special_tokens=False, split_special_tokens=True).input_ids
    assert kept != load_tokenizer(tokenizer_folder).ids_of(some)
    # A run that starts from it records the same of its own checkpoints.
    assert call(train, *flags(settings | {"run_name": "next", "model": str(best)})).code == 0
    saved = best.parent.with_name("next") / "best"
    assert json.loads((saved / "training.json").read_text())["tokenizer"]["other_ids"] is True
    outcome = call(perplexity, "--ckpt", str(saved))
    assert outcome.code == 0 and "ids that may not be SentencePiece's" in outcome.out
    assert load_tokenizer(saved, tokenizer_record(saved)).ids_of(some) == kept
    # The same with the base's own tokenizer.model beside it.
    shutil.copyfile(tokenizer_folder / "tokenizer.model", best / "tokenizer.model")
    seal(best)
    outcome = call(perplexity, "--ckpt", str(best))
    assert outcome.code == 0
    assert "was trained with ids other than its tokenizer.model's; they are kept" in outcome.out
    outcome = call(evaluate, "--ckpt", str(best), "--limit", "1", "--verify-batching", "0")
    assert outcome.code == 0
    assert "was trained with ids other than its tokenizer.model's; they are kept" in outcome.out
    again = load_tokenizer(best, tokenizer_record(best))
    assert again.ids_of(some) == kept and again.describe()["other_ids"]


# ---------------------------------------------------------------- no text is lost


def test_a_folder_without_a_vocabulary_is_refused(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a tokenizer of three tokens, which turns every text into nothing."""
    shutil.copytree(settings["model"], folder := tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()
    words = "has neither tokenizer.json nor tokenizer.model"
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error(words)
    for script in (evaluate, perplexity):
        call(script, "--ckpt", str(folder), *flags(settings)).assert_user_error(words)
    (folder / "tokenizer_config.json").unlink()
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error(words)


def empty_vocabulary(folder: Path) -> None:
    def empty(content: dict) -> None:
        content["model"]["vocab"] = {"<unk>": 0, "<s>": 1, "</s>": 2}
        content["model"]["merges"] = []

    edit(folder / "tokenizer.json", empty)


def lower_case(folder: Path) -> None:
    edit(
        folder / "tokenizer.json",
        lambda content: content["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"}),
    )


def no_bytes(folder: Path) -> None:
    def drop(content: dict) -> None:
        content["model"]["byte_fallback"] = False

    edit(folder / "tokenizer.json", drop)


def text_is_special(folder: Path) -> None:
    """A question contains "</s>", which becomes EOS and is decoded as "</s>" again."""
    edit(
        folder / "tokenizer.json", lambda content: content["added_tokens"][2].update(special=False)
    )


@pytest.mark.parametrize("damage", [empty_vocabulary, lower_case, no_bytes, text_is_special])
def test_a_tokenizer_that_loses_text_is_refused(
    call, settings: dict[str, str], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(settings["model"], folder := tmp_path / "losing")
    (folder / "tokenizer.model").unlink()
    damage(folder)
    words = (
        "reads text in line" if damage is text_is_special else "its tokenizer loses text in line "
    )
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error(words, "losing")
    rows = ["--ckpt", str(folder), *flags(settings)]
    call(perplexity, *rows, "--split", "train").assert_user_error(words)
    if damage is not text_is_special:  # no question that evaluate.py reads here contains one
        call(evaluate, *rows).assert_user_error(words)


@pytest.mark.parametrize("number", [0, 1])
def test_text_never_becomes_a_special_token(tmp_path: Path, corpus: list[str], number: int) -> None:
    """If it does, no text is lost, but the sequence ends in its middle, or begins there again."""
    folder = byte_level(tmp_path / "bytes", corpus)
    token = load_tokenizer(folder).piece(number)
    assert load_tokenizer(folder).encode([f"a {token} b"])
    edit(
        folder / "tokenizer.json",
        lambda content: content["added_tokens"][number].update(special=False),
    )
    with pytest.raises(
        UserError, match=f"reads text as its special token {re.escape(repr(token))}"
    ):
        load_tokenizer(folder).encode([f"a {token} b"])


def test_blanks_at_the_end_are_not_lost(tmp_path: Path, model_folder: Path) -> None:
    """Guards against a prompt whose last blank or line end the model does not see."""
    shutil.copytree(model_folder, folder := tmp_path / "losing")
    (folder / "tokenizer.model").unlink()
    assert load_tokenizer(folder).encode(["Answer: ", "Answer:\n"])
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    edit(folder / "tokenizer.json", lambda c: c["normalizer"]["normalizers"].insert(0, strip))
    for text in ("Answer: ", "Answer:\n"):
        with pytest.raises(UserError, match="its tokenizer loses text"):
            load_tokenizer(folder).encode([text])


def test_special_tokens_are_no_text_of_a_completion(tokenizer: Tokenizer) -> None:
    ids = tokenizer.ids_of(["It is 7."])[0]
    assert tokenizer.decode([*ids[:2], 1, *ids[2:], 2]) == "It is 7."


def test_blanks_and_peculiar_signs_are_no_loss(
    tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    tokenizer.encode([text for p in problems for text in (p.question, p.answer, f" {p.question}")])


def test_blanks_are_not_cleaned_up(tmp_path: Path, corpus: list[str]) -> None:
    """Guards against " ." becoming "." in completions, which Llama-3's settings ask for."""
    tokenizer = load_tokenizer(
        byte_level(tmp_path / "bytes", corpus, clean_up_tokenization_spaces=True)
    )
    [ids] = tokenizer.encode(["So 18 . Do n't , he 's"])
    assert tokenizer.decode(ids) == "So 18 . Do n't , he 's"


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"bos_token": ""},
            'has an empty bos_token, as LLaMA-1\'s first copies have: write .* "bos_token": "<s>"',
        ),
        ({"eos_token": {"content": ""}}, "has an empty eos_token"),
        ({"unk_token": ""}, "has an empty unk_token"),
        (
            {"bos_token": ["<s>"]},
            "its tokenizer_config.json says .*, which its vocabulary does not contain",
        ),
        ({"bos_token": None}, r"its tokenizer has no bos_token \(no file names one\)"),
        (
            {"eos_token": "<end>"},
            r"has no eos_token \(its tokenizer_config.json says '<end>', which its "
            "vocabulary does not contain",
        ),
    ],
)
def test_special_tokens_that_are_none(
    tmp_path: Path, tokenizer_folder: Path, change: dict[str, object], words: str
) -> None:
    shutil.copytree(tokenizer_folder, folder := tmp_path / "special")
    edit(folder / "tokenizer_config.json", lambda content: content.update(change))
    with pytest.raises(UserError, match=words):
        load_tokenizer(folder)


def test_the_first_file_that_names_a_special_token_counts(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Guards against another EOS than Transformers', and a null that hides the next file's."""
    shutil.copytree(tokenizer_folder, folder := tmp_path / "named")
    piece = load_tokenizer(folder).piece(300)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": piece}))
    for config, expected in (({"eos_token": "</s>"}, 2), ({"eos_token": None}, 300), ({}, 300)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
        assert load_tokenizer(folder).eos_token_id == expected


def test_special_tokens_of_a_lone_vocabulary_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A tokenizer.model names its own special tokens."""
    tmp_path.joinpath("lone").mkdir()
    shutil.copyfile(tokenizer_folder / "tokenizer.model", tmp_path / "lone" / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path / "lone")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_a_lone_vocabulary_file_without_special_tokens(tmp_path: Path, corpus: list[str]) -> None:
    """Guards against "its vocabulary says '<s>', which its vocabulary does not contain"."""
    folder = byte_level(tmp_path / "bytes", corpus)
    (folder / "tokenizer_config.json").unlink()
    words = r"no bos_token \(no file names one\): copy its tokenizer_config.json too"
    with pytest.raises(UserError, match=words):
        load_tokenizer(folder)


def test_more_tokens_than_the_embedding_has_rows(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """As in mirrors of Llama-2 with a pad token: only tokens in the data need an embedding."""
    base = Path(settings["model"])
    for name, files in (("json", ["tokenizer.json"]), ("model", ["tokenizer.model"])):
        shutil.copytree(base, folder := tmp_path / name)
        for file in {"tokenizer.json", "tokenizer.model"} - set(files):
            (folder / file).unlink()
        size = len(load_tokenizer(folder))
        pad = {"id": size, "content": "<pad>", "special": True, "single_word": False}
        pad |= {"lstrip": False, "rstrip": False, "normalized": False}
        if name == "json":
            edit(
                folder / "tokenizer.json",
                lambda content, pad=pad: content["added_tokens"].append(pad),
            )
        else:
            (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
        assert len(load_tokenizer(folder)) == size + 1
        outcome = call(
            train, *flags(settings | {"model": str(folder), "run_name": name, "epochs": "1"})
        )
        assert outcome.code == 0, outcome.err
        assert call(evaluate, "--ckpt", str(Path(settings["output_dir"]) / name / "best")).code == 0
        losses = [
            call(perplexity, "--ckpt", str(model), *flags(settings)).out.split("loss ")[1]
            for model in (base, folder)
        ]
        assert losses[0] == losses[1]


def test_a_row_that_needs_a_row_that_is_not_there_is_refused(
    call, settings: dict[str, str], make_llama, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    make_llama(len(tokenizer) - 60).save_pretrained(folder)
    tokenizer.save(folder)
    words = f"but its embedding has only {len(tokenizer) - 60} rows"
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error(words)
    for script in (evaluate, perplexity):
        call(script, "--ckpt", str(folder), *flags(settings)).assert_user_error(words)


def test_an_added_token_with_another_id_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, folder := tmp_path / "added")
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 5000}))
    with pytest.raises(UserError, match="its added token '<pad>' has the id 5000"):
        load_tokenizer(folder)


# ---------------------------------------------------------------- for other programs


def test_a_checkpoint_holds_the_tokenizer_files_of_its_base(
    call, settings: dict[str, str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """If there was no tokenizer.json it gets one, with the same ids for Transformers, BOS first."""
    shutil.copytree(settings["model"], folder := tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "pad_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert call(train, *flags(settings | {"model": str(folder)})).code == 0
    best = Path(settings["output_dir"]) / "test" / "best"
    for file in folder.iterdir():
        if file.name not in ("config.json", "generation_config.json", "model.safetensors"):
            assert (best / file.name).read_bytes() == file.read_bytes(), file.name
    reference = SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(best)
    for text in (f"x{text}" for text in texts(300)):
        ids = theirs(text, split_special_tokens=True).input_ids
        assert ids == [1, *reference.encode(text)]


def test_what_one_generation_of_transformers_cannot_read_is_changed(
    tmp_path: Path, corpus: list[str]
) -> None:
    """A class unknown to 4, and a list where 4 expects a dictionary."""
    folder = byte_level(
        tmp_path / "five",
        corpus,
        tokenizer_class="TokenizersBackend",
        extra_special_tokens=["<|end_of_text|>"],
        additional_special_tokens=["<|begin_of_text|>"],
        model_max_length=77,
    )
    (tmp_path / "saved").mkdir()
    load_tokenizer(folder).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast" and saved["model_max_length"] == 77
    assert "extra_special_tokens" not in saved and len(saved["additional_special_tokens"]) == 2


@pytest.mark.parametrize(
    ("kind", "saved_as"),
    [
        ("LLaMATokenizer", "PreTrainedTokenizerFast"),
        ("LlamaTokenizerFast", "LlamaTokenizerFast"),
        ("LlamaTokenizer", "LlamaTokenizer"),
        (None, "PreTrainedTokenizerFast"),
    ],
)
def test_a_class_that_one_generation_does_not_know_is_not_saved(
    tmp_path: Path, model_folder: Path, kind: str | None, saved_as: str | None
) -> None:
    shutil.copytree(model_folder, folder := tmp_path / "old")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": kind} if kind else {"legacy": False})
    )
    wanted = [f"x{text}" for text in texts(100)]
    tokenizer = load_tokenizer(folder)
    tokenizer.save(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved.get("tokenizer_class") == saved_as
    if saved_as == "PreTrainedTokenizerFast":  # which has no default special tokens
        assert (saved["bos_token"], saved["eos_token"], saved["unk_token"]) == (
            "<s>",
            "</s>",
            "<unk>",
        )
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(
        wanted, add_special_tokens=False, split_special_tokens=True
    ).input_ids == tokenizer.ids_of(wanted)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": False},
    ],
)
def test_what_is_saved_adds_bos_as_in_training(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str], asked: dict, kind: str
) -> None:
    """Guards against prompts that begin otherwise in other programs, whatever the base asks for.

    Transformers 4 takes this from the config, and 5 from the tokenizer.json alone.
    """
    folder = byte_level(tmp_path / "bytes", corpus, tokenizer_class=kind, **asked)
    tokenizer = load_tokenizer(folder)
    tokenizer.save(folder)
    [ids] = tokenizer.ids_of([PROBES[0]])
    assert AutoTokenizer.from_pretrained(folder)(PROBES[0]).input_ids == [0, *ids]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    wanted = {"add_bos_token": True, "add_eos_token": False}
    assert {name: config[name] for name in asked} == {name: wanted[name] for name in asked}
    assert read_otherwise(folder, capsys) == ""
    (tmp_path / "again").mkdir()  # as best is, after the first save of last
    tokenizer.save(tmp_path / "again")
    for name, content in read_files(folder).items():
        assert (tmp_path / "again" / name).read_bytes() == content, name


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_adds_no_bos_is_named(
    tmp_path: Path, corpus: list[str], tokenizer_folder: Path, capsys, file: str
) -> None:
    """Guards against a base that is measured otherwise than elsewhere, in silence."""
    if file == "tokenizer.json":
        folder = byte_level(tmp_path / "base", corpus)
    else:
        shutil.copytree(tokenizer_folder, folder := tmp_path / "base")
        assert read_otherwise(folder, capsys) == ""
        edit(folder / "tokenizer_config.json", lambda content: content.update(add_bos_token=False))
    bos = "<|begin_of_text|>" if file == "tokenizer.json" else "<s>"
    said = f"model {folder}: here each sequence begins with '{bos}', which the model's own"
    assert said in read_otherwise(folder, capsys)


def read_otherwise(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said before prompts are read."""
    capsys.readouterr()
    forget_what_was_said()
    load_tokenizer(folder).say_special(PROMPT)
    return capsys.readouterr().out


def test_dropout_is_refused(tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, folder := tmp_path / "random")
    edit(folder / "tokenizer.json", lambda content: content["model"].update(dropout=0.2))
    with pytest.raises(
        UserError, match=r"has a dropout of 0.2, which gives a text different ids each time"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("encode", [data.encode, data.encode_prompts])
def test_what_a_vocabulary_can_not_hold_is_said_with_its_line(
    tokenizer: Tokenizer, encode: Callable[..., list]
) -> None:
    """SentencePiece's sign for a blank is decoded as a blank."""
    with pytest.raises(
        UserError,
        match=r"loses text in line 7: '.*a▁b.*' becomes '.*a b.*remove what they can't represent",
    ):
        encode(tokenizer, [Problem("a▁b", "1\n#### 1", line=7)], PROMPT)


def test_a_pointer_of_git_is_said(tmp_path: Path, model_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        shutil.copytree(model_folder, folder := tmp_path / name)
        (folder / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"
        )
        with pytest.raises(
            UserError,
            match=rf"{name}: is a pointer to a file that git has not fetched: run git lfs pull",
        ):
            load_tokenizer(folder)


def test_damaged_tokenizer_files_are_named(tmp_path: Path, model_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        shutil.copytree(model_folder, folder := tmp_path / name)
        (folder / name).write_bytes(b"\x00\x01[")
        with pytest.raises(UserError, match=rf"its tokenizer can't be read \({name}: "):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<pad>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": {"content": 7}}}),
        ("added_tokens.json", {"<pad>": "many"}),
    ],
)
def test_added_tokens_of_any_form_are_read_or_refused(
    tmp_path: Path, tokenizer_folder: Path, name: str, content: object
) -> None:
    shutil.copytree(tokenizer_folder, folder := tmp_path / "added")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"its tokenizer can't be read \({name}: "):
        load_tokenizer(folder)


def test_an_added_token_is_read_in_text_unless_it_is_special(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Guards against other ids than those that the base was trained with."""
    shutil.copytree(tokenizer_folder, folder := tmp_path / "added")
    size = len(load_tokenizer(folder))
    mark = {"content": "####", "special": False, "normalized": False}
    added = {size + 1: {"content": "<pad>"}, size: mark}
    edit(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=added))
    [ids] = load_tokenizer(folder).ids_of(["It is <pad>.\n#### 7"])
    assert ids.count(size) == 1 and size + 1 not in ids


def test_a_tiktoken_file_beside_a_tokenizer_json_is_passed_over(
    tmp_path: Path, corpus: list[str]
) -> None:
    """Mirrors of Llama-3 have one, under the name of SentencePiece's file."""
    folder = byte_level(tmp_path / "three", corpus)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert load_tokenizer(folder).encode(["How many?"])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        UserError,
        match=r"its tokenizer.model is tiktoken's, not SentencePiece's: add the tokenizer.json",
    ):
        load_tokenizer(folder)


def test_encode_of_rows(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    examples = data.encode(tokenizer, problems, PROMPT)
    assert all(example.input_ids[0] == 1 and example.input_ids[-1] == 2 for example in examples)


def test_normalisers_of_every_kind_are_seen(
    tmp_path: Path, model_folder: Path, problems: list[Problem]
) -> None:
    """NFKC changes ½ and the no-break space, both of which GSM8K contains."""
    shutil.copytree(model_folder, folder := tmp_path / "nfkc")
    (folder / "tokenizer.model").unlink()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), backend.normalizer])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"loses text in line 0: .*\\xa0hard.* becomes "):
        data.encode(load_tokenizer(folder), problems, PROMPT)
