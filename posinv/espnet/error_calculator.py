"""The error rates of ASR validation, computed with jiwer."""

from collections.abc import Callable, Iterable, Sequence

import jiwer
from espnet2.legacy.nets import e2e_asr_common
from torch import Tensor


class ErrorCalculator(e2e_asr_common.ErrorCalculator):
    """ESPnet's error calculator without the package editdistance (no wheel for Python 3.13)."""

    def calculate_cer_ctc(self, ys_hat: Tensor, ys_pad: Tensor) -> float | None:
        """Return the character error rate of greedy CTC; None without a reference.

        Args:
            ys_hat: (B, F) int, the best token of each frame.
            ys_pad: (B, L) int, the reference tokens, -1 beyond their end.
        """
        skipped = {-1, self.idx_blank, self.idx_space}

        def text(ids: Iterable[int]) -> str:
            return "".join(self.char_list[i] for i in ids if i not in skipped)

        pairs = [
            (text(reference.tolist()), text(best.unique_consecutive().tolist()))
            for best, reference in zip(ys_hat, ys_pad, strict=True)
        ]
        references, hypotheses = zip(*pairs, strict=True)
        return self._rate(jiwer.process_characters, references, hypotheses)

    def calculate_cer(self, seqs_hat: Sequence[str], seqs_true: Sequence[str]) -> float | None:
        """Return the character error rate of transcripts without their spaces."""
        references, hypotheses = (
            [text.replace(" ", "") for text in texts] for texts in (seqs_true, seqs_hat)
        )
        return self._rate(jiwer.process_characters, references, hypotheses)

    def calculate_wer(self, seqs_hat: Sequence[str], seqs_true: Sequence[str]) -> float | None:
        """Return the word error rate of transcripts."""
        return self._rate(jiwer.process_words, seqs_true, seqs_hat)

    @staticmethod
    def _rate(
        process: Callable[[list[str], list[str]], jiwer.CharacterOutput | jiwer.WordOutput],
        references: Sequence[str],
        hypotheses: Sequence[str],
    ) -> float | None:
        kept = [pair for pair in zip(references, hypotheses, strict=True) if pair[0]]
        if not kept:
            return None
        counts = process(*map(list, zip(*kept, strict=True)))
        errors = counts.substitutions + counts.deletions + counts.insertions
        return errors / (counts.hits + counts.substitutions + counts.deletions)
