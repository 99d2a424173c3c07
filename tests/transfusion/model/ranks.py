"""What ranks that share rows compute, for tests/transfusion/model/test_context.py: run in each of four processes."""
import torch
import torch.distributed as dist

from tests.transfusion.conftest import in_training, tiny_decoder_config, tiny_model
from transfusion import Image, Text, Transfusion, TransfusionConfig
from transfusion.sequence import CONTEXT_ATTENTION, Context, encode, lay_out, with_clean_copies

LENGTH = 96
BACKBONES = "decoder", "adaln", "mixture_of_transformers"
UNET = dict(image_layers="unet", unet_channels=(8, 16), unet_blocks=1)
IMAGE_LAYERS = {"linear": dict(image_layers="linear"), "dit": {}, "unet": UNET}
MODELS = {f"{backbone}, {layers}": dict(backbone=backbone, **options)
          for backbone in BACKBONES for layers, options in IMAGE_LAYERS.items()}
MODELS |= {  # what else a model may be; "checkpointed" and "trained" are options of `built`
    "causal images": dict(image_attention="causal"),
    **{f"{backbone}, 2d": dict(backbone=backbone, positions="2d") for backbone in BACKBONES[1:]},
    "tied": dict(tie_word_embeddings=True),
    "window": dict(family="mistral", sliding_window=7),
    "windows in some layers": dict(family="gemma3_text", sliding_window=7,
                                   layer_types=["sliding_attention", "full_attention"]),
    "adaln, window": dict(family="mistral", sliding_window=7, backbone="adaln"),
    **{f"{backbone}, checkpointed": dict(backbone=backbone, checkpointed=True) for backbone in BACKBONES},
    "lora": dict(trained="lora", **UNET),
    "image layers alone": dict(trained="images", backbone="adaln", **UNET),
}
ROWS = "mixed", "one image", "text alone", "images alone"
EVERY_ROW = "decoder, unet", "adaln, unet", "mixture_of_transformers, dit", "lora"
ON_FOUR = {"decoder, unet": "ring", "adaln, 2d": "gathered", "mixture_of_transformers, dit": "gathered",
           "lora": "ring", "windows in some layers": "gathered"}
IN_FLOAT32 = "decoder, dit", "adaln, 2d", "mixture_of_transformers, linear", "decoder, unet"


def built(family=None, trained="all", checkpointed=False, dtype=torch.float64, **options):
    """A model in training, and the adapters around it; with a family, one of its decoders and a DiT head."""
    base = tiny_model(**options) if family is None else of_family(family, **options)
    return base, in_training(base.to(dtype), trained, checkpointed)


def of_family(family, backbone="decoder", **options):
    """As `tiny_model`, with the decoder of another family."""
    like = tiny_model()
    shared = {key: getattr(like.config, key) for key in ("patch_size", "boi_token_id", "eoi_token_id")}
    torch.manual_seed(0)
    model = Transfusion(TransfusionConfig(text_config=tiny_decoder_config(family, **options), backbone=backbone,
                                          **shared), like.tokenizer)
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith(("image_head", "patch_embedding")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(kind, base):
    """Two packed rows: documents of text, pictures of two sizes, clean copies and padding, or some of these alone."""
    generator = torch.Generator().manual_seed(1)
    small, large = ([Image(torch.rand(1, size, size, generator=generator) * 2 - 1) for _ in range(3)]
                    for size in (4, 8))
    seven, four = Text("a handwritten seven"), Text("a handwritten four")
    documents = {
        "mixed": [[[seven, large[0], four, small[0]], [small[1], four]], [[large[1]], [four, large[2], seven]]],
        "one image": [[[seven, small[0]], [four]], [[seven, four]]],
        "text alone": [[[seven, four], [four]], [[seven]]],
        "images alone": [[[large[0]], [small[0]]], [[large[1]]]],
    }[kind]
    encoded = [[with_clean_copies(encode(parts, base.tokenizer, base.config)) for parts in row] for row in documents]
    return lay_out(encoded, LENGTH, base.config.patch_dim)


def step(base, model, kind, context=None):
    """Losses and gradients of both rows: of one process, or sums over the ranks of a context."""
    sequence = rows(kind, base)
    times = torch.linspace(0.2, 0.8, sequence.image_count, dtype=base.dtype)
    part = sequence if context is None else base.share(sequence, context)
    model.zero_grad()
    output = model(part, times, torch.tensor([5, 6]))
    counts = len(sequence.text_targets), int(sequence.drawn.sum())
    shares = (len(part.text_targets), output.text_loss), (int(part.drawn.sum()), output.diffusion_loss)
    losses = [mean * (mine / max(1, count)) for (mine, mean), count in zip(shares, counts)]
    (losses[0] + 5 * losses[1]).backward()
    found = {"text loss": losses[0].detach(), "image losses": output.image_losses.detach()} | {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
        if p.requires_grad}
    if context is not None:
        for x in found.values():
            dist.all_reduce(x, group=context.group)
    return found


def difference(found, expected):
    """The largest difference of the losses, and that of each gradient, as shares of the largest numbers."""
    shares = {name: ((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-6)).item() if x.numel() else 0.0
              for name, x in expected.items()}
    losses = [shares.pop(name) for name in ("text loss", "image losses")]
    return {"losses": max(losses), "gradients": max(shares.values())}


def norm(found, expected):
    """The norm of the difference of all gradients together, as a share of their norm."""
    off, whole = (torch.cat([x.flatten() for name, x in these.items() if "loss" not in name])
                  for these in (subtracted(found, expected), expected))
    return (off.norm() / whole.norm()).item()


def subtracted(found, expected):
    """The differences."""
    return {name: found[name] - x for name, x in expected.items()}


def compare(groups):
    """What each way is off on two ranks and on four: `difference` in float64, and `norm` in float32."""
    found, pair = {}, dist.get_rank() // 2
    way = list(CONTEXT_ATTENTION)[pair]  # one pair gathers, the other passes around
    context = Context(groups[pair], CONTEXT_ATTENTION[way])
    for name, options in MODELS.items():
        base, model = built(**options)
        for kind in ROWS if name in EVERY_ROW else ROWS[:1]:
            alone = step(base, model, kind)
            found[name, kind, way, 2] = difference(step(base, model, kind, context), alone)
            if name in ON_FOUR:
                four = Context(None, CONTEXT_ATTENTION[ON_FOUR[name]])
                found[name, kind, ON_FOUR[name], 4] = difference(step(base, model, kind, four), alone)
    for name in IN_FLOAT32:
        base, model = built(dtype=torch.float32, **MODELS[name])
        alone, both = step(base, model, "mixed"), step(base, model, "mixed", context)
        found[name, way, "float32"] = difference(both, alone)["losses"], norm(both, alone)
    return found


def run(rank, folder):
    """Compare and save what was found."""
    torch.save(compare([dist.new_group([0, 1]), dist.new_group([2, 3])]), folder / f"{rank}.pt")
