"""How well a digits model draws and reads, judged by a classifier that never saw the model: a support vector machine.

    text_to_image_accuracy        share of generated digits that the judge reads as the asked one
    classifier_accuracy           share of held-out real digits that the judge reads right
    caption_accuracy              share of held-out real digits whose generated caption is exactly theirs
    nearest_train_distance_ratio  mean distance of generated digits to their nearest training digit, over the same mean
                                  for held-out real digits: near 0 would be copying, near 1 is as new as unseen writing
    within_class_spread_ratio     mean distance of generated digits to their class's mean, over the same for real digits
"""
import torch
from sklearn.svm import SVC
from torch import Tensor

from transfusion.model.transfusion import Transfusion
from transfusion.recipes.digits import Digits
from transfusion.sequence import Image, Part, Text


def fit_judge(train: Digits) -> SVC:
    """Fit the judge on real training digits."""
    return SVC(C=10, gamma=0.05).fit(train.pictures.flatten(1).numpy(), train.labels.numpy())


def read(judge: SVC, images: Tensor) -> Tensor:
    """Return the digit that the judge reads in each of (N, 1, 8, 8)."""
    return torch.tensor(judge.predict(images.flatten(1).numpy()))


def draw_digits(model: Transfusion, labels: Tensor, **options) -> Tensor:
    """Draw one digit per label from its caption: (N, 1, 8, 8), clipped to the ink's range."""
    images = model.draw([Digits.caption(label) for label in labels.tolist()], **options)
    return torch.stack([image.latent for image in images]).clamp(-1, 1)


def nearest_distance(images: Tensor, others: Tensor) -> float:
    """Mean Euclidean distance from each image to the nearest of `others`."""
    return torch.cdist(images.flatten(1), others.flatten(1)).amin(1).mean().item()


def within_class_spread(images: Tensor, labels: Tensor) -> float:
    """Mean over classes of the mean distance to the class's mean image."""
    groups = [images[labels == label].flatten(1) for label in labels.unique()]
    return torch.stack([(group - group.mean(0)).norm(dim=1).mean() for group in groups]).mean().item()


def evaluate(model: Transfusion, drawn: Tensor, asked: Tensor) -> dict[str, float]:
    """Return every measurement above for digits `drawn` for the labels `asked`."""
    train, held_out = Digits("train"), Digits("held-out")
    judge = fit_judge(train)
    captions = model.caption([Image(image) for image in held_out.pictures], max_new_tokens=16)
    right = [caption == Digits.caption(label) for caption, label in zip(captions, held_out.labels.tolist())]
    return {
        "text_to_image_accuracy": (read(judge, drawn) == asked).double().mean().item(),
        "classifier_accuracy": (read(judge, held_out.pictures) == held_out.labels).double().mean().item(),
        "caption_accuracy": sum(right) / len(right),
        "nearest_train_distance_ratio": (
            nearest_distance(drawn, train.pictures) / nearest_distance(held_out.pictures, train.pictures)),
        "within_class_spread_ratio": (
            within_class_spread(drawn, asked) / within_class_spread(train.pictures, train.labels)),
    }


def tell_story(model: Transfusion, prompt: str, seed: int = 0, tries: int = 20) -> list[Part]:
    """Let the model go on from `prompt` until it has drawn by itself and gone on in text; at most `tries` seeds."""
    parts: list[Part] = []
    for attempt in range(tries):
        parts = model.generate([Text(prompt)], max_images=2, temperature=1.0, seed=seed + attempt)
        kinds = [type(part) for part in parts]
        if Image in kinds and Text in kinds[kinds.index(Image):]:
            break
    return parts
