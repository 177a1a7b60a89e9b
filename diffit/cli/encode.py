"""``diffit data encode``: the latents of a set of pictures, for latent networks to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffit.cli.arguments import named_folder, positive_int, require_out_folder

HELP = "encode pictures into the latents that latent networks train on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("source", type=Path, help="pictures as `diffit data` packs them")
    add("--preset", required=True, metavar="NAME", help="the network to train: sets size, classes")
    add(
        "--out",
        type=named_folder,
        required=True,
        help="folder; the same command again completes it",
    )
    add("--vae", metavar="FOLDER|ID", help="autoencoder (default: the published networks')")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="pictures at once (8)")
    add("--device", help="default: cuda where there is one, else cpu")


def run(arguments: argparse.Namespace) -> None:
    """Write the shards; under torchrun each process writes its own.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: wrong input.
    """
    import torch
    from tqdm import tqdm

    from diffit.cli.machine import pick_device
    from diffit.cli.networks import announce_hub
    from diffit.data.dataset import ImageDataset
    from diffit.data.encode import encode
    from diffit.models import LatentDiffiT, create_model
    from diffit.models.vae import LatentCodec
    from diffit.ranks import ranks

    require_out_folder("--out", arguments.out)
    with torch.device("meta"):
        network = create_model(arguments.preset)
    if not isinstance(network, LatentDiffiT):
        raise ValueError(f"--preset: expected a latent network, got {arguments.preset}")
    device = pick_device(arguments.device)
    vae = arguments.vae or LatentCodec.DEFAULT
    announce_hub(vae)
    codec = LatentCodec.from_pretrained(vae).to(device)
    dataset = ImageDataset(
        arguments.source,
        resolution=network.input_size * codec.downscale,
        num_classes=network.num_classes,
    )
    with ranks() as peers:
        share = -(-len(dataset) // peers.size)
        bar = tqdm(total=share, unit=" pictures", disable=None if peers.first else True)
        with bar:
            encode(
                dataset,
                arguments.out,
                codec,
                vae=vae,
                device=device,
                batch_size=arguments.batch_size,
                ranks=peers,
                advance=bar.update,
            )
        peers.all(None)
        if peers.first:
            tqdm.write(f"{arguments.out}: the latents of {len(dataset)} pictures")
