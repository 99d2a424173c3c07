"""What each of several ranks holds of packed rows: nothing is left out, nothing held twice, and all hold as much."""
import dataclasses

import pytest
import torch

from tests.transfusion.conftest import tiny_model
from tfkernels.parallel import SharedMask
from transfusion import Image, Text
from transfusion.sequence import Context, Modality, encode, lay_out, share, with_clean_copies


class Ranks(Context):
    """A context whose ranks are all in this process: number 0 is the rank, and 1 how many there are."""

    rank = property(lambda self: self.group[0])
    ranks = property(lambda self: self.group[1])


def rows(documents=20, length=512):
    """Two rows of short documents: text and images of three sizes, noised and clean, one of them only read."""
    model, generator = tiny_model(), torch.Generator().manual_seed(1)
    made = []
    for n in range(documents):
        size = (4, 8, 12)[n % 3]
        image = Image(torch.rand(1, size, size, generator=generator), loss=n != 4)
        parts = [Text("a handwritten seven " * (1 + n % 4)), image, Text("and a four")]
        made.append(with_clean_copies(encode(parts[n % 2:], model.tokenizer, model.config)))
    return lay_out([made[::2], made[1::2]], length, model.config.patch_dim)


def shares(sequence, ranks):
    """The share of each rank."""
    return [share(sequence, sequence.mask(), Ranks((rank, ranks))) for rank in range(ranks)]


def places(part, inner):
    """Where places among a rank's tokens are among those of the rows."""
    length, tokens = part.documents.shape[1], part.cut.tokens[part.context.rank]
    return inner // len(tokens) * length + tokens[inner % len(tokens)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_target_and_patch_is_held_by_one_rank(ranks):
    sequence = rows()
    parts = shares(sequence, ranks)
    assert torch.equal(parts[0].cut.join([part.tokens for part in parts]), sequence.tokens)
    assert torch.equal(parts[0].cut.join([part.modality.image_ids for part in parts]), sequence.image_ids)
    for name in ("target_places", "text_targets"):
        found = [places(part, part.target_places) if name == "target_places" else part.text_targets for part in parts]
        order = torch.cat([places(part, part.target_places) for part in parts]).argsort()
        assert torch.equal(torch.cat(found)[order], getattr(sequence, name))
    for part in parts:
        of_patches = places(part, part.modality.patch_places)
        assert (sequence.image_ids.flatten()[of_patches] == part.modality.image_ids.flatten()[
            part.modality.patch_places]).all()
    patches = torch.cat([places(part, part.modality.patch_places) for part in parts]).sort().values
    assert torch.equal(patches, sequence.patch_places)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_image_is_drawn_by_one_rank_which_has_all_its_patches(ranks):
    sequence = rows()
    parts = shares(sequence, ranks)
    counts = torch.stack([part.layout.offsets.diff() for part in parts])
    assert torch.equal(counts.sum(0), sequence.layout.offsets.diff()) and ((counts > 0).sum(0) == 1).all()
    assert torch.equal(torch.stack([part.drawn for part in parts]).sum(0).bool(), sequence.drawn)
    assert sum(part.image_count for part in parts) == sequence.image_count
    for part in parts:
        assert torch.equal(part.patches, torch.cat([
            sequence.patches[first:end] for first, end, count in
            zip(sequence.layout.offsets, sequence.layout.offsets[1:], part.layout.offsets.diff()) if count]))
        assert torch.equal(part.timed, sequence.drawn) and torch.equal(part.layout.columns, sequence.layout.columns)
        assert sum(len(ids) for _, ids, _ in part.layout.by_grid()) == part.image_count
        assert len(part.layout.image_ids) == len(part.patches)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_a_rank_sends_is_what_the_others_receive_and_belongs_there(ranks):
    sequence = rows()
    parts = shares(sequence, ranks)
    numbers = torch.arange(len(sequence.patches))
    sent = []
    for part in parts:
        is_own = (part.layout.offsets.diff() > 0)[sequence.layout.image_ids]
        sent.append(numbers[is_own][part.route.rows].split(part.route.sent))
    for receiver, part in enumerate(parts):
        assert part.route.received == tuple(len(pieces[receiver]) for pieces in sent)
        arrived = torch.cat([pieces[receiver] for pieces in sent])
        assert torch.equal(places(part, part.route.places), sequence.patch_places[arrived])


def test_tokens_areas_and_patches_are_even():
    sequence = rows(documents=36, length=1024)
    keys = sequence.mask().visible_keys()
    for ranks in (2, 4, 8):
        parts = shares(sequence, ranks)
        areas = torch.tensor([keys[:, part.cut.tokens[part.context.rank]].sum() for part in parts]).double()
        patches = torch.tensor([len(part.patches) for part in parts]).double()
        assert areas.max() <= 1.1 * areas.mean() and patches.max() <= 1.2 * patches.mean()
        assert len({part.tokens.shape for part in parts}) == 1


def test_a_share_moves_to_a_device_whole_and_keeps_the_mask_of_whole_rows():
    sequence = rows()
    part = shares(sequence, 2)[1].to("meta")
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        held = value if isinstance(value, (tuple, Modality)) else getattr(value, "tokens", [value])
        assert all(x.is_meta for x in held if isinstance(x, torch.Tensor)), field.name
    part = shares(sequence, 2)[1]
    for mask, whole in ((part.mask(), sequence.mask()), (part.causal_mask(), sequence.causal_mask())):
        assert isinstance(mask, SharedMask) and torch.equal(mask.whole.dense(), whole.dense())


def test_rows_without_images_are_shared_too():
    model = tiny_model()
    sequence = lay_out([[encode([Text("a handwritten seven")], model.tokenizer, model.config)]], 64,
                       model.config.patch_dim)
    for part in shares(sequence, 2):
        assert part.image_count == 0 and part.patches.shape == (0, model.config.patch_dim)
        assert part.route.sent == part.route.received == (0, 0) and part.layout.by_grid() == []
