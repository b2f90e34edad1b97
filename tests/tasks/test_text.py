"""Text tasks: exact lengths with any tokenizer, the same from the same seed, answers where they should be."""

import json

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seerattention import testbed
from seerattention.files import DamagedFileError
from seerattention.tasks import RULER_TASKS, TEXT_TASKS, TextTasks, score_answer
from seerattention.tasks.questions import load_questions

LENGTH = 4096
CHAT = "{% for m in messages %}<bos>[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}[assistant]"


def letter_tokenizer():
    """A token a byte, and nothing but that."""
    vocabulary = {letter: i for i, letter in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", chat_template=CHAT)


@pytest.fixture(scope="module")
def books(tokenizer):
    return [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in testbed.book_texts("test")[:2]]


@pytest.fixture
def maker(tokenizer, books):
    return TextTasks(tokenizer, books, seed=3)


def test_there_are_thirteen_like_rulers_and_three_more():
    assert len(RULER_TASKS) == 13
    assert sum(task.startswith("niah_") for task in RULER_TASKS) == 8
    assert set(TEXT_TASKS) - set(RULER_TASKS) == {"long_qa", "many_shot", "copy"}


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_lengths_are_exact_and_room_is_enough(maker, task):
    for length in (LENGTH, LENGTH + 37, 12000):
        samples = [maker.sample(task, length) for _ in range(3)]
        for sample in samples:
            assert sample.prompt.dtype == np.int64
            assert len(sample.prompt) + sample.room == length
            assert 0 < len(sample.gold) <= sample.room
        assert len({sample.room for sample in samples}) == 1
        assert len({sample.prompt.tobytes() for sample in samples}) == 3


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_same_seed_gives_the_same(tokenizer, books, task):
    def make(seed):
        made = TextTasks(tokenizer, books, seed=seed)
        return [made.sample(task, LENGTH) for _ in range(2)]

    first, again, other = make(5), make(5), make(6)
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.prompt, b.prompt)
        assert (a.answers, a.places, a.room) == (b.answers, b.places, b.room)
        assert np.array_equal(a.gold, b.gold)
        assert not np.array_equal(a.prompt, c.prompt)


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_answer_is_where_it_is_said_to_be(maker, tokenizer, task):
    for length in (LENGTH, 9000):
        sample = maker.sample(task, length)
        assert sample.places
        assert all(1 <= start < stop <= len(sample.prompt) for start, stop in sample.places)
        shown = " ".join(tokenizer.decode(sample.prompt[start:stop]) for start, stop in sample.places)
        if sample.score == "copied":
            (start, stop), cut = sample.places[0], len(sample.prompt)
            passage = sample.prompt[start:stop]
            given = len(passage) - len(sample.gold)
            assert np.array_equal(passage[given:], sample.gold)
            assert np.array_equal(passage[:given], sample.prompt[cut - given :])
        elif sample.score == "normalised":
            assert task == "qa_hotpot" or any(answer in shown for answer in sample.answers)
            assert score_answer("normalised", tokenizer.decode(sample.gold), sample.answers) == 1
        else:
            assert all(answer in shown for answer in sample.answers)
            assert score_answer(sample.score, tokenizer.decode(sample.gold), sample.answers) == 1


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_last_row_of_the_prompt_has_to_find_the_answer(maker, tokenizer, task):
    """A space before the answer that is a token of its own would be found without looking anything up."""
    for _ in range(4):
        sample = maker.sample(task, LENGTH)
        assert tokenizer.decode(sample.gold[:1]).strip()


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"])
def test_one_needle_answers_the_question(maker, tokenizer, task):
    sample = maker.sample(task, LENGTH)
    text = tokenizer.decode(sample.prompt)
    assert text.count(sample.answers[0]) == 1
    (start, stop) = sample.places[0]
    assert sample.answers[0] in tokenizer.decode(sample.prompt[start:stop])
    if task == "niah_multikey_2":
        assert tokenizer.decode(sample.prompt).count("number") + text.count("passcode") > 150


def test_a_chain_of_variables(maker, tokenizer):
    sample = maker.sample("variable_tracking", LENGTH)
    lines = [tokenizer.decode(sample.prompt[start:stop]).strip() for start, stop in sample.places]
    value = lines[0].rpartition(" ")[2]
    assert lines == [
        f"let {sample.answers[0]} = {value}",
        *(f"let {b} = {a}" for a, b in zip(sample.answers, sample.answers[1:], strict=False)),
    ]
    assert f"the value {value}" in tokenizer.decode(sample.prompt[-60:])


def test_common_words_are_the_most_common(maker, tokenizer):
    sample = maker.sample("common_words", 8192)
    words = [line.partition(". ")[2] for line in tokenizer.decode(sample.prompt).split("\n") if ". " in line[:8]]
    counts = {word: words.count(word) for word in set(words)}
    assert {word for word, count in counts.items() if count >= 29} >= set(sample.answers[:9])
    assert sorted(counts.values())[-11] <= 3
    assert len(counts) > 100


def test_frequent_words_are_the_most_frequent(maker, tokenizer):
    sample = maker.sample("frequent_words", LENGTH)
    words = tokenizer.decode(sample.prompt).split()
    made_up = sorted({w for w in words if len(w) == 6 and w.isalpha()}, key=words.count, reverse=True)
    assert made_up[:3] == list(sample.answers)
    assert words.count(made_up[2]) > words.count(made_up[3])


def test_many_shot_labels_follow_from_nouns(maker, tokenizer):
    sample = maker.sample("many_shot", LENGTH)
    text = tokenizer.decode(sample.prompt)
    examples = [line[6:].rstrip(".").split(". Class: ") for line in text.split("\n") if line.startswith("Item: ")]
    known = {}
    for phrase, label in examples[1:-1]:
        assert known.setdefault(phrase.split()[1], label) == label
    asked = examples[-1][0].removesuffix(". Class:").split()
    assert known[asked[1]] == sample.answers[0]
    assert " ".join(asked) not in [phrase for phrase, *_ in examples[:-1]]
    assert len(set(known.values())) == 4


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_any_tokenizer_and_a_chat_template(books, tokenizer, task):
    letters = letter_tokenizer()
    texts = [np.array(letters.encode(tokenizer.decode(book[:20000]), add_special_tokens=False)) for book in books]
    plain, chat = TextTasks(letters, texts, seed=1), TextTasks(letters, texts, seed=1, chat=True)
    length = 24000
    for made in (plain, chat):
        sample = made.sample(task, length)
        assert len(sample.prompt) + sample.room == length
        text = letters.decode(sample.prompt)
        assert text.count("<bos>") == 1
        assert text.startswith("<bos>")
        wrapped = "[user] " in text and " [end][assistant]" in text[-300:]
        assert wrapped == (made is chat)


def test_what_cannot_be(maker, tokenizer, books):
    with pytest.raises(ValueError, match="task must be one of niah_single_1"):
        maker.sample("nothing", LENGTH)
    for task in TEXT_TASKS:
        with pytest.raises(ValueError, match=f"{task} does not fit into 60 tokens"):
            maker.sample(task, 60)
    with pytest.raises(ValueError, match="no chat template"):
        TextTasks(tokenizer, books, chat=True)


def test_the_subsets_are_small_and_say_whose_they_are():
    found = load_questions()
    assert len(found.articles) == 12
    assert len(found.squad) == 892
    assert len(found.hotpot) == 40
    for asked in found.squad:
        text = found.articles[asked.article].paragraphs[asked.paragraph]
        assert any(answer in text for answer in asked.answers)
    assert all(any(asked.answers[0] in text for text in asked.own) for asked in found.hotpot[:5])
    from seerattention.tasks import questions

    data = questions._SUBSETS
    assert sum(path.stat().st_size for path in data.iterdir()) < 2**20
    assert "CC BY-SA 4.0" in (data / "README.md").read_text()


def test_sets_by_path(tmp_path, tokenizer, books):
    squad = {
        "data": [
            {
                "title": "Lakes",
                "paragraphs": [
                    {
                        "context": "The lake is 40 miles long.",
                        "qas": [
                            {"question": "How long?", "answers": [{"text": "40 miles"}], "is_impossible": False},
                            {"question": "How deep?", "answers": [], "is_impossible": True},
                        ],
                    }
                ],
            }
        ]
    }
    (tmp_path / "dev.json").write_text(json.dumps(squad))
    found = load_questions(str(tmp_path))
    assert [(asked.question, asked.answers) for asked in found.squad] == [("How long?", ("40 miles",))]
    made = TextTasks(tokenizer, books, questions=str(tmp_path))
    sample = made.sample("qa_squad", 2048)  # there are no others: book text fills the rest
    assert len(sample.prompt) + sample.room == 2048
    assert len(made.sample("long_qa", 2048).prompt) == len(sample.prompt)
    with pytest.raises(ValueError, match="no questions of HotpotQA"):
        made.sample("qa_hotpot", 2048)

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FileNotFoundError, match="no question sets"):
        load_questions(str(other))
    (other / "a.json").write_text('{"questions": []}')
    with pytest.raises(ValueError, match="another layout"):
        load_questions(str(other))
    (other / "a.json").unlink()
    (other / "b.json.zst").write_bytes(zstandard.compress(b"[1, 2")[:-3])
    with pytest.raises(DamagedFileError, match=r"b\.json\.zst"):
        load_questions(str(other))
