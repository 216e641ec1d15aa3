"""Validation's error rates with jiwer."""

import jiwer
from espnet2.legacy.nets import e2e_asr_common


class ErrorCalculator(e2e_asr_common.ErrorCalculator):
    """ESPnet's, which would need the package editdistance (it has no wheel for Python 3.13)."""

    def calculate_cer_ctc(self, ys_hat, ys_pad) -> float | None:
        """Return the character error rate of greedy CTC; None without a reference.

        Args:
            ys_hat: (B, F) int, the best token of each frame.
            ys_pad: (B, L) int, the reference tokens, -1 beyond their end.
        """
        skipped = {-1, self.idx_blank, self.idx_space}

        def text(ids) -> str:
            return "".join(self.char_list[i] for i in ids if i not in skipped)

        pairs = [
            (text(reference.tolist()), text(best.unique_consecutive().tolist()))
            for best, reference in zip(ys_hat, ys_pad, strict=True)
        ]
        references, hypotheses = zip(*pairs, strict=True)
        return self._rate(jiwer.process_characters, references, hypotheses)

    def calculate_cer(self, seqs_hat, seqs_true) -> float | None:
        """Return the character error rate of transcripts, spaces left out."""
        texts = ([text.replace(" ", "") for text in seqs] for seqs in (seqs_true, seqs_hat))
        return self._rate(jiwer.process_characters, *texts)

    def calculate_wer(self, seqs_hat, seqs_true) -> float | None:
        """Return the word error rate of transcripts."""
        return self._rate(jiwer.process_words, seqs_true, seqs_hat)

    @staticmethod
    def _rate(process, references, hypotheses) -> float | None:
        kept = [pair for pair in zip(references, hypotheses, strict=True) if pair[0]]
        if not kept:
            return None
        counts = process(*map(list, zip(*kept, strict=True)))
        errors = counts.substitutions + counts.deletions + counts.insertions
        return errors / (counts.hits + counts.substitutions + counts.deletions)
