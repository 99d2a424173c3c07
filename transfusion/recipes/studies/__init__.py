"""The paper's ablations (arXiv:2408.11039, section 4.3 and table 3), small enough for one CPU core.

The pairs of arms are the paper's; the pictures are real, and each arm is trained with three seeds.

    python -m transfusion.studies NAME --data digits|emoji        NAME:

    attention      table 5   inside an image: bidirectional against causal attention, with linear and with U-Net image
                             layers
    image-layers   table 7   linear against U-Net image layers
    noise-limit    table 8   pictures before their captions noised to half the time at most, or without that limit
    patch-size     table 6   patches of three sizes, equal numbers of tokens in a batch
    tokens         table 3   continuous patches against the codes of a VQ autoencoder in the text's vocabulary
                             (Chameleon, arXiv:2405.09818)
    all                      every one of them; arms that studies share are trained once

All arms of a data set have the same decoder, steps, tokens in a batch and captions, drawn in the same order. The
recipe is the paper's (lambda 5, linear image layers, noise limit 0.5, guidance 3, times uniform; section 4.3) but for
what minutes of training need: the target is v on the paper's cosine schedule, for after 600 steps an error of eps
near t = 1, divided by the little signal there, threw drawn digits to 100 times their range; and half, not 80 %, of
the captions stand first, for few pictures are read otherwise. Pictures are pixels, as in the paper's footnote 3;
there is no VAE. A run = (data set, arm, seed) leaves its checkpoint and metrics.json in <out>/<data>/<arm>-<seed>; a
study reads them, trains what is missing (a run that was interrupted goes on) and writes <out>/<data>-<study>.md,
.json, .png and -samples.png. One run takes three to six minutes of one CPU core, all of a data set about two hours.
"""
