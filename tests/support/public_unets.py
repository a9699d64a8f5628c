"""Random UNets of torchcfm and their outputs: `python -m tests.support.public_unets FOLDER CASES`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchcfm.models.unet.unet import UNetModel


def main(folder, cases):
    for seed, (name, case) in enumerate(cases.items()):
        torch.manual_seed(seed)
        network = UNetModel(
            image_size=8,
            in_channels=3,
            model_channels=128,
            out_channels=3,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_classes=case["classes"] or None,
            num_head_channels=64,
            use_scale_shift_norm=case["scale_shift"],
            resblock_updown=case["resample"],
            use_new_attention_order=case["new_order"],
        ).eval()
        with torch.no_grad():
            for weight in network.parameters():  # many start at zero
                weight.add_(0.05 * torch.randn_like(weight))
        answers = {"t": torch.tensor([0.3, 0.9]), "x": torch.randn(2, 3, 8, 8)}
        if case["classes"]:
            answers["label"] = torch.tensor([1, 4])
        with torch.no_grad():
            answers["y"] = network(answers["t"], answers["x"], y=answers.get("label"))
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        save_file(answers, folder / f"{name}-answers.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
