"""Losses of short runs at full precision. A change of these numbers is a change of training: say why in its commit."""

import pytest

from qwen3vl_train.train.loop import train
from tests.helpers import small_runs

# Five steps on the untrained tiny checkpoint, seed 0, on a CPU. They change with anything that changes the data path
# (tokens, pixels, order of packs), the model, the loss, the optimizer, the schedule or, for LoRA, the random numbers.
GOLDEN = {
    "full": [6.779473713466099, 6.5694642596774635, 4.644712335923138, 5.125143116918103, 3.367136001586914],
    "lora": [6.779473713466099, 6.961810641818577, 6.804671904620002, 6.4543086084826236, 6.501476848826689],
}


@pytest.mark.parametrize("method", GOLDEN)
def test_losses_are_unchanged(tiny_folder, task, tmp_path, method):
    tune = {"full": small_runs.FULL, "lora": small_runs.LORA}[method]
    recipe = small_runs.make_recipe(tiny_folder, task, tmp_path, tune=tune, train__num_steps=5)
    # Another CPU sums in another order: AVX-512, AVX2 and plain code were seen 1.3e-6 apart after five steps.
    assert small_runs.losses(train(recipe)) == pytest.approx(GOLDEN[method], abs=1e-5)
