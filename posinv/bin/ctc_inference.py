"""Greedy CTC decoding with trained heads, as in SUPERB: best path, no language model.

One process decodes a list with all heads on one front end, which computes its layers once.
"""

import logging
from pathlib import Path

import torch
from espnet2.text.build_tokenizer import build_tokenizer
from espnet2.text.token_id_converter import TokenIDConverter
from tqdm import tqdm

from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.checkpoint import read_checkpoint
from posinv.data.device import pick_device
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError
from posinv.espnet.heads import LayersTask, build_frontend, compute_layers


class Head:
    """A trained ESPnet ASR model on the front end ``ssl`` or ``enh_ssl``, without the front end.

    Decoding uses only its CTC layer.

    Args:
        directory: training directory of ``asr_train`` or ``heads_train``, with ``config.yaml`` and
            the checkpoint.
        checkpoint: file name of the checkpoint.
        device: device of the model, ``cpu`` or ``cuda``.

    Raises:
        InputError: a missing file, another front end, or a model without CTC.
    """

    def __init__(self, directory: Path, checkpoint: str, device: str) -> None:
        for path in (directory / "config.yaml", directory / checkpoint):
            if not path.is_file():
                raise InputError(f"--heads {directory}: no {path.name}; was its training run?")
        read_checkpoint(directory / checkpoint)  # ESPnet may load more than tensors
        self.model, args = LayersTask.build_model_from_file(
            str(directory / "config.yaml"), str(directory / checkpoint), device
        )
        if self.model.ctc is None:
            raise InputError(f"--heads {directory}: trained without CTC (ctc_weight 0)")
        self.model.eval()
        # Of a cache: decoding reads each utterance once.
        conf = {name: value for name, value in args.frontend_conf.items() if name != "cache_gb"}
        self.frontend = (args.frontend, conf)
        self.converter = TokenIDConverter(token_list=args.token_list)
        self.tokenizer = build_tokenizer(token_type=args.token_type, bpemodel=args.bpemodel)

    @torch.inference_mode()
    def decode(self, layers: torch.Tensor, frames: torch.Tensor) -> list[str]:
        """Decode a batch.

        Args:
            layers: of the SSL model, ``(B, F, L, D)``.
            frames: ``(B,)`` int, the frame counts.

        Returns:
            The B transcripts.
        """
        encoded, frames = self.model.encode(layers, frames)
        best = self.model.ctc.argmax(encoded)
        texts = []
        for path, length in zip(best, frames.tolist(), strict=True):
            tokens = path[:length].unique_consecutive()
            tokens = tokens[tokens != self.model.blank_id].tolist()
            texts.append(self.tokenizer.tokens2text(self.converter.ids2tokens(tokens)))
        return texts


def main() -> None:
    """Decode one list with every head; each head's transcripts go into a file of its own."""
    parser = command_parser(__doc__)
    parser.add_argument("--heads", nargs="+", type=Path, required=True, help="training directories")
    parser.add_argument("--checkpoint", default="valid.cer_ctc.best.pth", help="file in each")
    parser.add_argument("--wav_scp", type=Path, required=True, help="audio to decode, 16 kHz")
    parser.add_argument("--out", nargs="+", type=Path, required=True, help="a file for each head")
    parser.add_argument("--batch_size", type=int, default=8, help="utterances decoded together")
    parser.add_argument("--ngpu", type=int, default=0, help="0: CPU, 1: GPU")
    args = parser.parse_args()
    if len(args.out) != len(args.heads):
        parser.error(f"{len(args.heads)} heads and {len(args.out)} files for --out")
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")

    device = pick_device(args.ngpu)
    heads = [Head(directory, args.checkpoint, device) for directory in args.heads]
    for directory, head in zip(args.heads, heads, strict=True):
        if head.frontend != heads[0].frontend:
            raise InputError(
                f"--heads {directory}: its front end is {head.frontend}, that of {args.heads[0]} "
                f"{heads[0].frontend}: decode them by two commands"
            )
    frontend = build_frontend(*heads[0].frontend)
    entries = list(read_table(args.wav_scp).items())
    texts: list[dict[str, str]] = [{} for _ in heads]
    for start in tqdm(range(0, len(entries), args.batch_size), desc="decode", unit="batch"):
        batch = {
            utt_id: torch.from_numpy(read_audio(entry, SAMPLING_RATE))
            for utt_id, entry in entries[start : start + args.batch_size]
        }
        utt_ids = sorted(batch, key=lambda utt_id: -batch[utt_id].numel())
        waves = torch.nn.utils.rnn.pad_sequence([batch[i] for i in utt_ids], batch_first=True)
        lengths = torch.tensor([batch[i].numel() for i in utt_ids])
        layers = compute_layers(frontend, waves.to(device), lengths.to(device))
        for head, text in zip(heads, texts, strict=True):
            text.update(zip(utt_ids, head.decode(*layers), strict=True))
    for path, text in zip(args.out, texts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, text)
        logging.info("%d utterances decoded: %s", len(text), path)


if __name__ == "__main__":
    run(main)
