"""Pictures to latents and back: a pretrained variational autoencoder, frozen.

It is an AutoencoderKL of diffusers, as Stable Diffusion, FLUX and the paper have one.

    latent = (mean of the posterior - shift) * scale            picture = decoder(latent / scale + shift)

scale and shift are the autoencoder's own `scaling_factor` and `shift_factor`. `encode` takes the posterior's mean, not
a sample, so that the same picture gives the same latent; `posterior` gives what a sample is drawn from.
"""
import hashlib
from pathlib import Path

import diffusers  # its classes are looked up where they are used: with them come all its U-Nets, and scipy.stats
import torch
from torch import Tensor

from transfusion.files import check_files, current, read_json, replacing, whole
from transfusion.model.progress import without_progress_bars
from transfusion.model.weights import check_complete

CLASS = "AutoencoderKL"  # of diffusers


class VAE:
    """`encode` and `decode` of an AutoencoderKL.

    It is not a module: no optimizer, checkpoint or adapter of the model around it takes it along.
    """

    def __init__(self, autoencoder: "diffusers.AutoencoderKL"):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.channels, self.picture_channels = config.latent_channels, config.in_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # pixels to a side of a latent's element
        self.scale = 1.0 if config.scaling_factor is None else config.scaling_factor
        self.shift = 0.0 if config.shift_factor is None else config.shift_factor

    def __deepcopy__(self, memo):
        return self  # frozen: copies of the model around it share it

    def to(self, device: torch.device) -> "VAE":
        """Move it to `device`; what it makes comes back to the device of what it was given."""
        self.autoencoder.to(device)
        return self

    @classmethod
    @without_progress_bars()
    def from_pretrained(cls, path: Path) -> "VAE":
        """Load a directory with config.json and safetensors, as diffusers writes it. Pickled weights are refused."""
        if not current(path, "config.json").is_file():
            raise ValueError(f"VAE.from_pretrained: path is {str(path)!r}, which holds no config.json; "
                             "a directory that diffusers' AutoencoderKL wrote fits")
        try:
            with whole(path) as directory:
                check_files(directory)
                kind = read_json(directory / "config.json").get("_class_name", CLASS)
                if kind != CLASS:
                    raise ValueError(f"VAE.from_pretrained: path is {str(path)!r}, which holds an {kind}; {CLASS} fits")
                autoencoder, found = diffusers.AutoencoderKL.from_pretrained(
                    directory, use_safetensors=True, output_loading_info=True)
                check_complete("VAE.from_pretrained", "path", path, found)
                return cls(autoencoder)
        except OSError as error:
            raise ValueError(f"VAE.from_pretrained: path is {str(path)!r}, whose weights cannot be loaded ({error}); "
                             "safetensors fit") from error

    @without_progress_bars()
    def save_pretrained(self, path: Path) -> None:
        """Write config.json and safetensors; what the directory held stands until both are whole."""
        with replacing(path) as fresh:
            self.autoencoder.save_pretrained(fresh, safe_serialization=True)

    def fingerprint(self) -> str:
        """A hash of weights, scale and shift: equal for autoencoders that make the same latents."""
        digest = hashlib.sha256(repr((self.scale, self.shift)).encode())
        for name, x in sorted(self.autoencoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.float().cpu().contiguous().numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (N, channels, H, W) in [-1, 1] to latents (N, C, H / factor, W / factor)."""
        return self._latents("encode", pictures)[0]

    @torch.inference_mode()
    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pictures' latents, on their scale: mean + deviation * noise is a latent."""
        mean, posterior = self._latents("posterior", pictures)
        return mean, (posterior.std.float() * self.scale).to(pictures.device)

    def _latents(self, op: str, pictures: Tensor):
        """Latents, and the posterior, diffusers' DiagonalGaussianDistribution."""
        if pictures.ndim != 4 or any(side % self.factor for side in pictures.shape[-2:]):
            raise ValueError(f"VAE.{op}: pictures has shape {tuple(pictures.shape)}; (N, channels, height, width) "
                             f"with sides that {self.factor} divides fit; resize or crop them")
        given = pictures.to(self.autoencoder.device, self.autoencoder.dtype)
        posterior = self.autoencoder.encode(given).latent_dist
        return ((posterior.mode().float() - self.shift) * self.scale).to(pictures.device), posterior

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to pictures (N, channels, h * factor, w * factor) in [-1, 1]."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"VAE.decode: latents has shape {tuple(latents.shape)}; "
                             f"(N, {self.channels}, height, width) fits")
        given = (latents.float() / self.scale + self.shift).to(self.autoencoder.device, self.autoencoder.dtype)
        return self.autoencoder.decode(given).sample.float().clamp(-1, 1).to(latents.device)
