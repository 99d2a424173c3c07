"""Scores of captions against numbers worked out by hand and, where it is installed, pycocoevalcap."""
import json
import math

import pytest

from transfusion.cli import main
from transfusion.eval.captions import bleu, cider_d, rouge_l, words
from transfusion.eval.results import read_results

ANSWERS = ["a dog runs on the green grass", "two cats sleep on a red sofa", "a man rides a horse"]
REFERENCES = [["a dog runs across the green grass", "a brown dog is running on grass"],
              ["two cats are sleeping on a red couch", "cats sleep on a sofa", "two cats on a sofa"],
              ["a man riding a brown horse", "the man is on a horse on the beach"]]


def split(texts):
    """Texts, or lists of texts, as lists of words."""
    return [text.split() if isinstance(text, str) else split(text) for text in texts]


def test_words_are_lower_case_without_punctuation_and_contractions_are_split():
    assert words("A dog, isn't it?  The man's 3.5 black-and-white dogs -- they’re 1,000!") == [
        "a", "dog", "is", "n't", "it", "the", "man", "'s", "3.5", "black-and-white", "dogs", "they", "'re", "1,000"]
    assert words("'Hi' (café_au_lait).") == ["hi", "café", "au", "lait"]
    assert words("cafe\N{COMBINING ACUTE ACCENT}") == ["café"], "composed or not, a word is one"
    for word in ("हिन्दी", "ภาษาไทย"):  # whose vowels are marks
        assert words(f"{word}, {word}") == [word, word]


def test_bleu_of_a_caption_whose_counts_are_clipped():
    """Of 7 words 5 are in the reference, "the" twice; of 6 pairs 3, of 5 triples 2, of 4 quadruples 1."""
    answer, reference = split(["the the the cat sat on it", "the cat sat on the mat"])
    precisions = 5 / 7, 3 / 6, 2 / 5, 1 / 4
    assert bleu([answer], [[reference]]) == pytest.approx(math.prod(precisions) ** 0.25, rel=1e-12)


def test_bleu_shortens_a_short_caption_against_the_reference_nearest_in_length():
    answers = split(["a b c d"])
    assert bleu(answers, split([["a b c d e", "a b c d e f g"]])) == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu(answers, split([["x y z", "a b c d e"]])) == 1.0, "of equally near ones the shorter counts"
    assert bleu([["a"]], [[["a"]]]) == 0.0, "there are no pairs"


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    """Common are a c e: 3 of 4 words of the caption, 3 of 5 of the reference."""
    precision, recall = 3 / 4, 3 / 5
    score = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(split(["a x c e"]), split([["a b c d e"]])) == pytest.approx(score, rel=1e-12)
    assert rouge_l(split(["a x c e", "q"]), split([["a b c d e"], ["w"]])) == pytest.approx(score / 2, rel=1e-12)


def test_cider_d_of_two_captions_by_hand():
    """An n-gram that stands with one of the two captions, or with none, weighs log 2; one that stands with both, 0.

    "a x y" has the words a, x, y against x, y, z: a stands with the other caption alone and weighs log 2, too, so the
    cosine is 2 / (sqrt 3 sqrt 3). It has the pairs a x, x y against x y, y z: 1 / (sqrt 2 sqrt 2). It has no common
    triple. The caption "a" is its reference, which has no pairs.
    """
    found = cider_d(split(["a x y", "a"]), split([["x y z"], ["a"]]))
    assert found == pytest.approx([10 * (2 / 3 + 1 / 2) / 4, 10 * 1 / 4], rel=1e-12)
    found = cider_d(split(["a x", "a y"]), split([["a x"], ["a y"]]))
    assert found == pytest.approx([10 * 2 / 4, 10 * 2 / 4], rel=1e-12), "words and pairs"
    found = cider_d(split(["a x y", "a"]), split([["a x"], ["a"]]))  # a weighs nothing now, and so does the caption "a"
    words_and_pairs = 1 / math.sqrt(2) + 1 / math.sqrt(2)
    assert found == pytest.approx([10 * math.exp(-1 / 72) * words_and_pairs / 4, 0], rel=1e-12)


def test_cider_d_of_other_lengths_is_damped_and_repeated_words_are_clipped():
    filler = split([["q r s t"]])
    same = cider_d(split(["x y z w", "q r s t"]), [*split([["x y z w"]]), *filler])
    assert same == [pytest.approx(10), pytest.approx(10)]
    repeated = cider_d(split(["x x x x", "q r s t"]), [*split([["x"]]), *filler])[0]
    cosine = 1 * 1 / (4 * 1)  # min(4, 1) times 1, over their lengths
    assert repeated == pytest.approx(10 * cosine * math.exp(-9 / 72) / 4, rel=1e-12)


def test_scores_are_those_of_pycocoevalcap():
    """What version 1.2 of it gives for these captions, split at spaces."""
    answers, references = split(ANSWERS), split(REFERENCES)
    assert bleu(answers, references) == pytest.approx(0.35808766072189274, rel=1e-9)  # it adds 1e-9 to the counts
    assert rouge_l(answers, references) == pytest.approx(0.8106134362381523, rel=1e-12)
    assert cider_d(answers, references) == pytest.approx([3.134589730054003, 3.462662176397519, 1.8966060682053196],
                                                         rel=1e-12)


def test_the_command_reads_cocos_files_and_writes_a_result_for_each_number(tmp_path):
    (tmp_path / "answers.jsonl").write_text("\n".join(
        json.dumps({"image_id": i, "caption": text + "."}) for i, text in enumerate(ANSWERS)))
    (tmp_path / "references.json").write_text(json.dumps({"images": [], "annotations": [
        {"image_id": i, "caption": text.capitalize()} for i, texts in enumerate(REFERENCES) for text in texts]}))
    main(["eval", "captions", "--answers", str(tmp_path / "answers.jsonl"),
          "--references", str(tmp_path / "references.json"), "--out", str(tmp_path), "--model", str(tmp_path)])
    found = {result.metric: result for result in read_results(tmp_path).values()}
    answers, references = split(ANSWERS), split(REFERENCES)
    assert found["BLEU-4"].value == pytest.approx(100 * bleu(answers, references))
    assert found["ROUGE-L"].value == pytest.approx(100 * rouge_l(answers, references))
    assert found["CIDEr-D"].value == pytest.approx(100 * sum(cider_d(answers, references)) / 3)
    assert "not by Stanford's PTB" in found["CIDEr-D"].note
    assert (found["CIDEr-D"].n, found["CIDEr-D"].model) == (3, str(tmp_path))


@pytest.mark.parametrize("answers, says", [
    ('{"image_id": 9, "caption": "a"}', "'9' of .* has 1 captions and 0 references"),
    ('{"image_id": 0, "caption": "a"}\n{"image_id": 0, "caption": "b"}', "'0' of .* has 2 captions"),
    ('{"image_id": 0}', "row 0 has the id 0 and the text None"), ("", "holds no captions"), ("{", "line 1 is damaged"),
])
def test_answers_that_do_not_fit_are_named(answers, says, tmp_path):
    (tmp_path / "a.jsonl").write_text(answers)
    (tmp_path / "r.json").write_text(json.dumps([{"id": 0, "captions": ["a", "b"]}]))
    with pytest.raises(SystemExit, match=says):
        main(["eval", "captions", "--answers", str(tmp_path / "a.jsonl"), "--references", str(tmp_path / "r.json"),
              "--out", str(tmp_path)])
