"""POPE as LLaVA scores it, by hand-made answers; needs no lmms-eval."""
import pytest

from transfusion.eval import judged

SCORES = (judged.pope_accuracy, judged.pope_precision, judged.pope_recall, judged.pope_f1, judged.pope_yes)


def scored(*answers):
    """(category, known answer, what was said) as `pope` makes it of them."""
    return [judged.pope({"category": category, "answer": known}, [said])["pope_f1_score"]
            for category, known, said in answers]


@pytest.mark.parametrize("said,read", [
    ("Yes.", "yes"), ("yes", "yes"), ("", "yes"), ("There is a dog. No cat.", "yes"), ("nothing", "yes"),
    ("No", "no"), ("no, there is none", "no"), ("There is not. Yes", "no"), ("No, I see one", "no")])
def test_the_first_sentence_is_read_as_llava_reads_it(said, read):
    record, = scored(("popular", "yes", said))
    assert record["said"] == (read == "yes")


def test_recall_counts_every_question_that_yes_is_right_for():
    answers = [("random", "yes", "yes"), *[("random", "yes", "no")] * 3, *[("random", "no", "no")] * 4]
    assert [score(scored(*answers)) for score in SCORES] == pytest.approx([5 / 8, 1, 1 / 4, 2 / 5, 1 / 8])


def test_each_number_is_the_mean_of_the_parts():
    answers = [("random", "yes", "yes"), ("random", "no", "no"),
               ("popular", "yes", "yes"), *[("popular", "no", "yes")] * 3]
    assert judged.pope_f1(scored(*answers)) == pytest.approx((1 + 2 * 0.25 / 1.25) / 2)
    assert judged.pope_yes(scored(*answers)) == pytest.approx((1 / 2 + 1) / 2)


def test_without_an_answer_yes_nothing_is_divided_by_nothing():
    assert [score(scored(("random", "yes", "no"))) for score in SCORES] == [0, 0, 0, 0, 0]
    assert judged.pope_recall(scored(("random", "no", "no"))) == 0
