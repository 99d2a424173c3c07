"""What is measured of a trained arm, and against what.

    label_accuracy      share of drawn pictures that the classifier reads as the asked class
    frechet             Frechet distance between drawn and real pictures in the classifier's pooled features
    precision, recall   share of drawn pictures near real ones, and of real ones near drawn ones, in these features
                        (arXiv:1904.06991)
    caption_accuracy    share of held-out pictures whose greedily written caption is exactly theirs
    caption_loss        nats per token of captions behind their held-out pictures
    text_loss           nats per token of captions alone

The classifier was trained on the same real training pictures; real pictures are those of both splits. `floor` and
`perfect` are what real pictures get.
"""
import torch
from torch import Tensor

from transfusion.eval.features import Features, in_batches
from transfusion.eval.metrics import frechet_distance, precision_recall
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Document, Part, Sequence, Text, encode, pack
from transfusion.train.classifier import accuracy
from transfusion.train.estimates import work


class Yardstick:
    """Real pictures and a classifier that has seen the training ones."""

    def __init__(self, train, held_out, classifier: Features):
        self.train, self.held_out, self.classifier = train, held_out, classifier
        self.real = in_batches(self.classifier.pooled, torch.cat([train.pictures, held_out.pictures]))

    def pictures(self, drawn: Tensor, asked: Tensor) -> dict[str, float]:
        """Measure pictures drawn for the classes `asked`."""
        features = in_batches(self.classifier.pooled, drawn)
        near = precision_recall(self.real, features)
        return {"frechet": frechet_distance(self.real, features), "precision": near.precision, "recall": near.recall,
                "label_accuracy": accuracy(self.classifier, drawn, asked)}

    def perfect(self, asked: Tensor) -> dict[str, float]:
        """Measure as many real pictures of the classes `asked`, each class's in order: what a perfect model gets."""
        labels = torch.cat([self.train.labels, self.held_out.labels])
        chosen = torch.empty_like(asked)
        for label in asked.unique():
            places, own = (asked == label).nonzero()[:, 0], (labels == label).nonzero()[:, 0]
            chosen[places] = own[torch.arange(len(places)) % len(own)]
        return {"frechet": frechet_distance(self.real, self.real[chosen])}

    def floor(self) -> dict[str, float]:
        """Measure held-out pictures against training ones."""
        train, held_out = self.real.split([len(self.train.pictures), len(self.held_out.pictures)])
        near = precision_recall(train, held_out)
        return {"frechet": frechet_distance(train, held_out), "precision": near.precision, "recall": near.recall,
                "label_accuracy": accuracy(self.classifier, self.held_out.pictures, self.held_out.labels)}


def caption_accuracy(model: Transfusion, prompts: list[list[Part]], captions: list[str]) -> float:
    """Share of prompts behind which the model writes exactly the caption."""
    longest = max(len(model.tokenizer.encode(caption)) for caption in set(captions))
    written = model.generate_batch(prompts, max_images=0, max_new_tokens=longest + 1)
    said = ["".join(part.text for part in parts).strip() for parts in written]
    return sum(a == b for a, b in zip(said, captions)) / len(captions)


@torch.no_grad()
def text_loss(model: Transfusion, prompts: list[list[Part]], captions: list[str]) -> float:
    """Nats per token of captions, each behind its prompt; the prompts' own tokens and the end do not count."""
    documents = [_caption_alone(encode([*prompt, Text(caption)], model.tokenizer, model.config, end=False),
                                len(Text(caption).token_ids(model.tokenizer, model.config)))
                 for prompt, caption in zip(prompts, captions)]
    sequence = pack(documents, max(len(document.tokens) for document in documents), model.config.patch_dim)
    return model(sequence, torch.zeros(sequence.image_count), 0).text_loss.item()


def _caption_alone(document: Document, count: int) -> Document:
    return document._replace(targets=[False] * (len(document.tokens) - count) + [True] * count)


def flops(model: Transfusion, sequence: Sequence) -> dict[str, int]:
    """Return multiplications and additions of matrices in the forward pass of packed documents.

    Layers and attention are those of `transfusion.train.estimates.work`; heads are the text's where there is a text
    target, and linear image layers at each patch. A U-Net's convolutions are not counted. Training costs three times as
    much.
    """
    parts = work(model, model, sequence)
    names = ("patch_embedding.linear.weight", "image_head.linear.weight")
    linear = sum(p.numel() for name, p in model.named_parameters() if name in names)
    return {"layers": parts["layers"].forward, "attention": parts["attention"].forward,
            "heads": parts["text head"].forward + 2 * linear * len(sequence.patches)}
