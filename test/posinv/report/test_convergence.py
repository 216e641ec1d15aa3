import pytest

from posinv.report.convergence import RELATIVE, fine_tuning_panels
from posinv.report.experiment import Experiment


def test_losses_beside_their_first_value(tmp_path, save_epochs):
    """Less is better, also where a loss is below 0, as that of ssl_xcorr."""
    losses = {"ssl_mse": (20.0, 15.0), "ssl_xcorr": (-0.5, -0.6), "zero": (0.0, 0.1)}
    for system, values in losses.items():
        folder = tmp_path / "seed1" / system
        save_epochs(folder, 2, loss=lambda epoch, values=values: values[epoch - 1])
        (folder / "config.yaml").write_text("accum_grad: 2\n")
    curves = fine_tuning_panels(Experiment.read(tmp_path))[RELATIVE]["updates"]
    shown = {system: of_seeds[0][1] for system, of_seeds in curves.items()}
    assert shown["ssl_mse"] == pytest.approx([1, 0.75])
    assert shown["ssl_xcorr"] == pytest.approx([1, 0.8])
    assert shown["zero"] == pytest.approx([1, 1.1])
    assert curves["ssl_mse"][0][0] == [0.5, 1]  # total_count is the epoch in these
