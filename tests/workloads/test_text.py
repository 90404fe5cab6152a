"""workloads/text.py: files become tokens that know their bytes, and tokens become windows that do not overlap."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from moe_lab.workloads import text
from moe_lab.workloads.text import Domain, Windows, read_domains, text_input, windows

CPU = torch.device("cpu")
SENTENCES = ["The naïve café serves jalapeños.", "日本語のテキスト", "smile 😀 and 😀 again\r\n"]
MIXED = "Ein naïver Gast:\r\n\r\n  日本語 und 😀!\n"


def folder(path: Path, **texts: str | bytes) -> str:
    """Files `name.txt` with these contents; in a name, `__` is a dot that begins another suffix."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        file = path / (name.replace("__", ".") if "__" in name else f"{name}.txt")
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def byte_level(path: Path, *, trim: bool = False) -> Path:
    """A trained byte-level BPE, as GPT-2's and its followers'."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.save(str(path))
    return path


def word_level(path: Path, words: Sequence[str]) -> Path:
    """One id a word, in order; id 0 is the unknown one; it lowers case, and pads and cuts unless it is told not to."""
    ids = {word: index for index, word in enumerate(["[unk]", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[unk] $A", special_tokens=[("[unk]", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    return path


def numbered(*lengths: int) -> list[Domain]:
    """Domain d with the ids 1000 d, 1000 d + 1, ...; token i is 1 + i % 3 bytes long."""
    domains = []
    for d, n in enumerate(lengths):
        ends_N = (1 + torch.arange(n) % 3).cumsum(0)
        domains.append(Domain(f"d{d}", 1000 * d + torch.arange(n), ends_N))
    return domains


# Reading


def test_bytes_are_the_ids_of_a_model_with_256(tmp_path: Path) -> None:
    """UTF-8 as it lies in the file, line ends and a byte order mark included; token i ends at byte i + 1."""
    content = b"\xef\xbb\xbf" + MIXED.encode()
    (domain,) = read_domains(folder(tmp_path, mixed=content) + "/mixed.txt", 256, None)
    assert domain.name == "mixed"
    assert domain.ids_N.dtype == domain.byte_ends_N.dtype == torch.int64
    assert bytes(domain.ids_N.tolist()) == content
    assert domain.byte_ends_N.tolist() == list(range(1, len(content) + 1))


def test_a_folder_gives_its_texts_in_order_but_no_readme(tmp_path: Path) -> None:
    """`*.txt` and `*.md` directly in it, by name; a README.md that is named is taken."""
    path = folder(
        tmp_path, b="bee", a__md="ay", C="sea", README__md="about", notes__rst="no", readme="a text all the same"
    )
    folder(tmp_path / "below.txt", d="not directly in it")
    assert [domain.name for domain in read_domains(path, 256, None)] == ["C", "a", "b", "readme"]
    assert [domain.name for domain in read_domains(f"{path}/README.md", 256, None)] == ["README"]


def test_a_list_of_files_and_folders_keeps_its_order(tmp_path: Path) -> None:
    """As Hydra gives it; a file that is named twice counts once."""
    one, two = folder(tmp_path / "one", x="x", y="y"), folder(tmp_path / "two", a="a")
    found = read_domains(OmegaConf.create([f"{two}/a.txt", one, f"{one}/../one/x.txt"]), 256, None)
    assert [domain.name for domain in found] == ["a", "x", "y"]


def test_names_are_unique_whatever_the_files_are_called(tmp_path: Path) -> None:
    """As much of the path as it takes, for those that collide."""
    paths = [folder(tmp_path / place, news=place) for place in ("en/a", "de/a", "fr")]
    paths.append(folder(tmp_path / "fr", news__md="other", alone="1"))
    found = read_domains(paths, 256, None)
    assert [domain.name for domain in found] == ["en/a/news.txt", "de/a/news.txt", "alone", "fr/news.md", "fr/news.txt"]


def test_a_link_has_its_own_name(tmp_path: Path) -> None:
    """And not that of the file it leads to."""
    folder(tmp_path / "blobs", **{"5f2a": "text"})
    (tmp_path / "poems.txt").symlink_to(tmp_path / "blobs" / "5f2a.txt")
    assert [domain.name for domain in read_domains(str(tmp_path), 256, None)] == ["poems"]


@pytest.mark.parametrize("trim", [pytest.param(False, id="offsets"), pytest.param(True, id="trimmed_offsets")])
def test_byte_level_tokens_end_at_their_bytes(tmp_path: Path, trim: bool) -> None:
    """Of every prefix of tokens that ends with a whole character, the text has as many bytes as they say."""
    file = byte_level(tmp_path / "tokenizer.json", trim=trim)
    (domain,) = read_domains(folder(tmp_path / "t", mixed=MIXED), 300, file)
    tokenizer = Tokenizer.from_file(str(file))
    alphabet = {c: b for b, c in zip(sorted_bytes(), pre_tokenizers_alphabet(), strict=True)}
    tokens = [bytes(alphabet[c] for c in tokenizer.id_to_token(i)) for i in domain.ids_N.tolist()]
    assert b"".join(tokens) == MIXED.encode()
    ends = domain.byte_ends_N.tolist()
    assert ends == sorted(ends) and ends[-1] == len(MIXED.encode())
    whole = 0
    for i, end in enumerate(ends):
        prefix = b"".join(tokens[: i + 1])
        if is_utf8(prefix) and not (trim and prefix.endswith(b" ")):
            assert end == len(prefix)
            whole += 1
    assert whole > 10


def sorted_bytes() -> list[int]:
    """GPT-2's bytes, in the order of the characters that stand for them: those that print first."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printing + [b for b in range(256) if b not in printing]


def pre_tokenizers_alphabet() -> list[str]:
    """The characters that stand for `sorted_bytes`."""
    printing = sorted_bytes()[:188]
    return [chr(b) for b in printing] + [chr(256 + n) for n in range(68)]


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_words_end_where_they_end_in_the_text(tmp_path: Path) -> None:
    """Spaces between count with the word that follows; no special token, no padding, nothing cut off."""
    file = word_level(tmp_path / "tokenizer.json", ["naïve", "日本", "x"])
    content = " Naïve  日本 nobody\tX\n"
    (domain,) = read_domains(folder(tmp_path / "t", words=content), 4, file)
    assert domain.ids_N.tolist() == [1, 2, 0, 3]
    assert domain.byte_ends_N.tolist() == [7, 15, 22, 24]
    assert [len(content[:n].encode()) for n in (6, 10, 17, 19)] == [7, 15, 22, 24]


@settings(max_examples=60, deadline=None, database=None)
@given(content=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), data=st.data())
def test_character_ends_become_byte_ends(content: str, data: st.DataObject) -> None:
    """The bytes before, counted by encoding each prefix; an end that lies before the last one is moved to it."""
    ends = data.draw(st.lists(st.integers(0, len(content)), min_size=1))
    found = text._byte_ends(content, ends).tolist()
    assert found == [len(content[: max(ends[: i + 1])].encode()) for i in range(len(ends))]


def test_a_text_is_read_once_unless_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of a sweep asks; another size, time, vocabulary or tokenizer is read anew."""
    read: list[Path] = []
    content = text._content
    monkeypatch.setattr(text, "_content", lambda file: (read.append(file), content(file))[1])
    path, tokenizer = folder(tmp_path / "t", a="aa", b="bb"), word_level(tmp_path / "tokenizer.json", ["aa"])
    first, again = read_domains(path, 256, None), read_domains([path], 256, None)
    assert len(read) == 2 and again[0].ids_N is first[0].ids_N and again is not first
    read_domains(path, 256, tokenizer)
    assert len(read) == 4
    os.utime(tmp_path / "t" / "a.txt", ns=(1, 1))
    read_domains(path, 256, None)
    assert len(read) == 6
    word_level(tokenizer, ["aa", "bb", "cc"])
    assert read_domains(path, 256, tokenizer)[1].ids_N.tolist() == [2]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        pytest.param(None, r"workload\.path: .*needs a text file, a folder", id="none"),
        pytest.param([], r"workload\.path: .*needs a text file, a folder", id="no_entries"),
        pytest.param(
            "nowhere.txt", r"workload\.path=\S*nowhere\.txt: .*file or folder not found; give", id="not_there"
        ),
        pytest.param("no_texts", r"workload\.path=\S*no_texts: no texts in this folder.*README", id="folder_of_readme"),
        pytest.param("empty.txt", r"workload\.path: \S*empty\.txt is empty; add", id="empty"),
        pytest.param("latin1.txt", r"workload\.path: \S*latin1\.txt is not UTF-8 \(at byte 3\); convert", id="latin1"),
    ],
)
def test_a_path_that_cannot_be_read_is_a_mistake(tmp_path: Path, entry: str | list[str] | None, message: str) -> None:
    """One line with the key, the file and the mend."""
    folder(tmp_path, empty="", latin1=b"caf\xe9 au lait", good="text")
    folder(tmp_path / "no_texts", README__md="about", image__png=b"\x89")
    path = str(tmp_path / entry) if isinstance(entry, str) else entry
    with pytest.raises(ValueError, match=message) as caught:
        read_domains(path, 256, None)
    assert "\n" not in str(caught.value)
    if isinstance(path, str):
        with pytest.raises(ValueError, match=message):
            read_domains([str(tmp_path / "good.txt"), path], 256, None)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        pytest.param(None, r"the model has 300 ids but no tokenizer; put .*tokenizer\.json.* 256 ids", id="none"),
        pytest.param("not_there.json", r"\S*not_there\.json not found; put", id="not_there"),
        pytest.param("broken.json", r"\S*broken\.json is not a valid tokenizer\.json \(.*\); copy", id="broken"),
        pytest.param("larger.json", r"larger\.json gives the id 300, but the model has 300 ids", id="another_models"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_a_mistake(tmp_path: Path, tokenizer: str | None, message: str) -> None:
    """One line that says whose it must be."""
    path = folder(tmp_path / "t", a="w299")
    (tmp_path / "broken.json").write_text("{")
    word_level(tmp_path / "larger.json", [f"w{n}" for n in range(300)])
    with pytest.raises(ValueError, match=f"workload=text: .*{message}") as caught:
        read_domains(path, 300, tmp_path / tokenizer if tokenizer else None)
    assert "\n" not in str(caught.value)


# Windows


def check_windows(found: Windows, domains: list[Domain], S: int) -> None:
    """What holds of all: targets follow, nothing overlaps or leaves its domain, bytes are those of the targets."""
    assert found.names == tuple(domain.name for domain in domains)
    assert found.left_out == tuple(domain.name for domain in domains if len(domain.ids_N) <= S)
    assert found.ids_WS.shape == found.targets_WS.shape == (len(found.domain_W), S)
    assert {tensor.dtype for tensor in found[:4]} == {torch.int64}
    assert torch.equal(found.targets_WS, found.ids_WS + 1)
    assert torch.equal(found.ids_WS // 1000, found.domain_W.unsqueeze(1).expand(-1, S))
    assert torch.equal(found.targets_WS // 1000, found.ids_WS // 1000)
    assert found.ids_WS.unique().numel() == found.ids_WS.numel()
    assert found.bytes_W.tolist() == [sum(1 + i % 1000 % 3 for i in row) for row in found.targets_WS.tolist()]


def turns(there: Sequence[int], wanted: int | None) -> list[int]:
    """Whose turn it is, by going round."""
    order = [d for turn in range(max(there)) for d, n in enumerate(there) if turn < n]
    return order[:wanted]


@settings(max_examples=200, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=5),
    S=st.integers(1, 30),
    wanted=st.none() | st.integers(1, 80),
    seed=st.integers(-5, 2**40),
)
def test_windows_are_what_they_promise(lengths: list[int], S: int, wanted: int | None, seed: int) -> None:
    """Domains take turns; within one the windows go forward in nearly equal steps; the same seed gives the same."""
    domains, there = numbered(*lengths), [max(n - 1, 0) // S for n in lengths]
    if not any(there):
        with pytest.raises(
            ValueError, match=rf"workload\.path: .*seq_len={S} needs .*longest text has {max(lengths)}; lower"
        ):
            windows(domains, S, wanted, seed)
        return
    found = windows(domains, S, wanted, seed)
    check_windows(found, domains, S)
    assert found.domain_W.tolist() == turns(there, wanted)
    for d, n in enumerate(there):
        taken = found.ids_WS[found.domain_W == d, 0] - 1000 * d
        assert bool((taken % S == 0).all()) and bool((taken.diff() > 0).all())
        if len(taken) > 1:
            step = n / len(taken)
            assert float((taken.diff() / S - step).abs().max()) < 1
            assert float(taken[0]) / S < step
    again = windows(domains, S, wanted, seed)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], again[:4], strict=True))


def test_without_a_number_all_of_the_text_is_there_up_to_the_tail() -> None:
    """Every token but the first is a target once, and so are its bytes; what is left is shorter than a window."""
    domains, S = numbered(100, 37, 5, 64), 9
    found = windows(domains, S, None, seed=3)
    for d, domain in enumerate(domains):
        n = max(len(domain.ids_N) - 1, 0) // S * S
        assert found.targets_WS[found.domain_W == d].flatten().tolist() == domain.ids_N[1 : n + 1].tolist()
        total = int(domain.byte_ends_N[n] - domain.byte_ends_N[0])
        assert int(found.bytes_W[found.domain_W == d].sum()) == total
    assert found.left_out == ("d2",)
    more = windows(domains, S, 10**6, seed=4)
    assert torch.equal(more.ids_WS, found.ids_WS)


def test_a_domain_that_runs_out_gives_its_share_to_the_others() -> None:
    """2 of the short one, 5 and 4 of the long ones."""
    found = windows(numbered(500, 21, 500), 10, 11, seed=0)
    assert found.domain_W.tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0, 2, 0]


@settings(max_examples=50, deadline=None, database=None)
@given(seed=st.integers(0, 10**9))
def test_the_next_seed_has_other_windows(seed: int) -> None:
    """None in common, where less than a third of them is asked for: calibration uses the next seed."""
    one, other = (windows(numbered(901, 801), 10, 50, s).ids_WS for s in (seed, seed + 1))
    assert not set(one.flatten().tolist()) & set(other.flatten().tolist())


def test_seeds_reach_all_of_the_text() -> None:
    """One window of a hundred: over many seeds each comes up."""
    starts = Counter(int(windows(numbered(1001), 10, 1, seed).ids_WS[0, 0]) for seed in range(400))
    assert len(starts) == 100 and max(starts.values()) <= 6


# The workload


class Tokens(nn.Module):
    """A model as far as a workload looks at it."""

    def __init__(self, vocab_size: int | None, tokenizer_file: Path | None = None):
        super().__init__()
        self.vocab_size = vocab_size
        if tokenizer_file is not None:
            self.tokenizer_file = tokenizer_file


def input_of(
    model: nn.Module, path: str | None, *, batch: int = 3, seq_len: int = 4, seed: int = 0, ids: str = "text"
) -> Tensor:
    return text_input(
        model=model,
        batch=batch,
        seq_len=seq_len,
        seed=seed,
        device=CPU,
        dtype=torch.bfloat16,
        phase="forward",
        path=path,
        ids=ids,
    )


def test_the_input_is_rows_of_the_texts_in_turn(tmp_path: Path) -> None:
    """int64 [B, S], of bytes or by the model's tokenizer."""
    path = folder(tmp_path / "t", a="abcdefghijklmnop", b="ABCDEFGHIJKLMNOP")
    ids_BS = input_of(Tokens(256), path)
    assert ids_BS.dtype == torch.int64
    rows = [bytes(row).decode() for row in ids_BS.tolist()]
    assert rows[0] in "abcdefghijklmnop" and rows[1] in "ABCDEFGHIJKLMNOP" and rows[2] in "abcdefghijklmnop"
    words = folder(tmp_path / "w", a="one two three four five")
    tokenizer = word_level(tmp_path / "tokenizer.json", ["one", "two", "three", "four", "five"])
    assert input_of(Tokens(6, tokenizer), words, batch=1).tolist() == [[1, 2, 3, 4]]


def test_too_little_text_is_a_mistake(tmp_path: Path) -> None:
    """How many rows it gives."""
    path = folder(tmp_path, a="a" * 9, b="b" * 4)
    assert input_of(Tokens(256), path, batch=2).shape == (2, 4)
    with pytest.raises(ValueError, match=r"workload\.path=\S+: .* 2 windows of seq_len=4 tokens, but 3 .*batch"):
        input_of(Tokens(256), path)
    with pytest.raises(ValueError, match=r"workload\.path: .*seq_len=40 .*41 tokens.*longest text has 9"):
        input_of(Tokens(256), path, seq_len=40)


def test_a_text_without_tokens_is_too_short(tmp_path: Path) -> None:
    """Only spaces, for a tokenizer that drops them."""
    tokenizer = word_level(tmp_path / "tokenizer.json", ["one", "two"])
    path = folder(tmp_path / "t", blank=" \n ", words="one two one")
    domains = read_domains(path, 3, tokenizer)
    assert [len(domain.ids_N) for domain in domains] == [0, 3]
    assert windows(domains, 2, None, 0).left_out == ("blank",)


def test_a_model_of_hidden_states_has_no_text(tmp_path: Path) -> None:
    """It names a model that reads tokens."""
    with pytest.raises(ValueError, match=r"workload=text: .*hidden states.*decoder_moe"):
        input_of(Tokens(None), folder(tmp_path, a="text"))


def test_random_ids_take_the_place_of_the_texts(tmp_path: Path) -> None:
    """As many, of the whole vocabulary; other ones for another seed, and as much text is needed."""
    path = folder(tmp_path / "t", a="a" * 3000)
    ids_BS = input_of(Tokens(256), path, seq_len=512, ids="uniform")
    assert ids_BS.dtype == torch.int64 and ids_BS.shape == (3, 512)
    assert len(ids_BS.unique()) > 200 and int(ids_BS.min()) >= 0 and int(ids_BS.max()) < 256
    assert not torch.equal(ids_BS, input_of(Tokens(256), path, seq_len=512, ids="uniform", seed=1))
    with pytest.raises(ValueError, match="5 windows of seq_len=512 tokens, but 6"):
        input_of(Tokens(256), path, seq_len=512, batch=6, ids="uniform")
