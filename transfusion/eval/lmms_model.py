"""Transfusion checkpoints as a model of lmms-eval: `lmms-eval --model transfusion --model_args pretrained=DIR`.

Only lmms-eval and `transfusion eval vqa` import this file, which needs lmms-eval.
"""
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image as Picture
from tqdm import tqdm

from transfusion.device import launched, own_device
from transfusion.eval.asking import Asker, AskingSettings, Likelihood, Question
from transfusion.eval.kept_answers import Answers, identity
from transfusion.eval.results import weights_hash
from transfusion.eval.settings import ModelSettings
from transfusion.model.loading import load_model
from transfusion.settings import check, nearest

MAX_NEW_TOKENS = 1024
"""where a task does not say it"""


class Request(NamedTuple):
    """One request of lmms-eval; its pictures are decoded when they are needed."""

    text: str
    to_visual: Callable[[dict], Sequence[Picture.Image] | None]
    number: int
    task: str
    split: str
    options: dict[str, Any]
    """what is wanted of the model, in JSON's kinds"""


class TransfusionModel(lmms):
    """A checkpoint, or the directory of an adapter, asked in batches.

    Args:
        pretrained: the directory.
        batch_size: questions asked at once.
        device: "auto", "cpu" or "cuda"; of several processes each takes the accelerator of its LOCAL_RANK.
        answers: directory where answers are kept, so that the same call goes on after a stop.
        options: the other fields of `ModelSettings` and those of `AskingSettings`.

    Raises:
        ValueError: an option that does not fit, named.
    """

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None,
                 answers: str | None = None, max_batch_size: int | None = None, **options):
        super().__init__()
        names = {kind: [name for name in kind.__dataclass_fields__ if name in options]
                 for kind in (ModelSettings, AskingSettings)}
        for name in options:
            if not any(name in known for known in names.values()):
                fits = [name for kind in names for name in kind.__dataclass_fields__]
                raise ValueError(f"eval: {name} is no option of the model; {', '.join(fits)} fit{nearest(name, fits)}")
        if isinstance(options.get("mixture"), str):
            options["mixture"] = Path(options["mixture"])
        loading, asked = (kind(**{name: options[name] for name in known}) for kind, known in names.items())
        check("eval", loading)
        check("eval", asked)
        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"eval: batch_size is {batch_size}; a whole number of at least 1 fits")
        self._rank, self._world_size = launched()
        own = own_device("eval", device or "auto", self._rank, self._world_size)
        self.model = loading.cast(load_model(Path(pretrained), str(own)))
        asking, self.max_new_tokens = asked.asking(self.model), asked.max_new_tokens
        self.asker = Asker(self.model, asking)
        self.weights_hash = weights_hash(Path(pretrained))
        self.kept = Answers(None if answers is None else Path(answers),
                            identity(self.weights_hash, asking, str(self.model.dtype), self.asker.turn_end),
                            self._rank)
        self.device, self.too_long = self.model.device, 0

    def generate_until(self, requests: list) -> list[str]:
        """Answer each request: greedily, unless its task says otherwise; pictures stand before the text, in order.

        A question that fills the model's positions has an empty answer, and `too_long` counts them.
        """
        asked = []
        for request in requests:
            text, options, *rest = request.args
            asked.append(Request(text, *rest, _options(options, self.max_new_tokens)))
        answers = self._answered(asked, self._generated, same_options=True)
        self.too_long = answers.count(None)
        return [answer or "" for answer in answers]

    def loglikelihood(self, requests: list) -> list[GenerationResult]:
        """Weigh each request's continuation: its tokens' mean loss, and whether it would be written greedily.

        lmms-eval takes the choice of the lowest loss, not of the highest probability, and makes a text of a tuple that
        is in no `GenerationResult`.
        """
        asked = []
        for request in requests:
            text, target, *rest = request.args
            _, number, task, split = rest
            answer = target(self.task_dict[task][split][number]) if callable(target) else target
            asked.append(Request(text, *rest, {"answer": answer.strip()}))  # the template has a space
        weighed = self._answered(asked, self._weighed, same_options=False)
        self.too_long = sum(log_probability == -math.inf for log_probability, _, _ in weighed)
        return [GenerationResult((-log_probability / max(1, tokens), greedy))
                for log_probability, greedy, tokens in weighed]

    def generate_until_multi_round(self, requests: list) -> list[str]:
        """Refuse: questions of several rounds are not asked."""
        raise ValueError("eval: a task asks in several rounds, which this model class does not; tasks of one question "
                         "with its pictures fit")

    def _generated(self, batch: list[Request]) -> list[str | None]:
        options = batch[0].options
        return self.asker.answers([self._question(one) for one in batch], **{**options, "stop": tuple(options["stop"])})

    def _weighed(self, batch: list[Request]) -> list[Likelihood]:
        return self.asker.likelihoods([self._question(one) for one in batch], [one.options["answer"] for one in batch])

    def _question(self, asked: Request) -> Question:
        where = f"{asked.task}, row {asked.number}"
        pictures = asked.to_visual(self.task_dict[asked.task][asked.split][asked.number]) or []
        for picture in pictures:
            if not isinstance(picture, Picture.Image):
                raise ValueError(f"eval: {where} shows a {type(picture).__name__}; pictures fit")
        return Question(asked.text, tuple(pictures), where)

    def _answered(self, asked: list[Request], answer: Callable[[list[Request]], list], same_options: bool) -> list:
        """Answers in order: those that are kept, and of the others batches, of longer texts first."""
        keys = [self._key(one) for one in asked]
        groups = defaultdict(dict)
        for key, one in zip(keys, asked):
            if key not in self.kept.known:
                groups[str(sorted(one.options.items())) if same_options else ""][key] = one
        progress = tqdm(total=sum(map(len, groups.values())), desc="answers", disable=self.rank != 0)
        for group in groups.values():
            left = sorted(group.items(), key=lambda pair: -len(pair[1].text))
            for start in range(0, len(left), self.batch_size):
                some = dict(left[start:start + self.batch_size])
                self.kept.keep(zip(some, answer(list(some.values()))))
                progress.update(len(some))
        progress.close()
        return [self.kept.known[key] for key in keys]

    def _key(self, asked: Request) -> str:
        """What an answer depends on beside the model: the row, by its data set's fingerprint, the text, the options."""
        rows = self.task_dict[asked.task][asked.split]
        return self.kept.key(asked.task, asked.split, getattr(rows, "_fingerprint", ""), asked.number, asked.text,
                             asked.options)


def _options(given: dict, most: int | None) -> dict[str, Any]:
    """A task's options of generation in this project's words; those without a counterpart, such as beams, are dropped.

    Temperature counts where the task says `do_sample`, as in transformers.
    """
    stop = given.get("until") or []
    count = int(given.get("max_new_tokens") or MAX_NEW_TOKENS)
    options = {"max_new_tokens": count if most is None else min(count, most),
               "stop": [text for text in ([stop] if isinstance(stop, str) else stop) if text]}
    if given.get("do_sample") and given.get("temperature"):
        options |= {"temperature": float(given["temperature"]), "top_p": float(given.get("top_p") or 1.0)}
    return options
