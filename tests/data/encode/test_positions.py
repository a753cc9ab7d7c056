import pytest
import torch

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.encode.positions import mrope_positions
from tests.helpers import oracles


def test_worked_example():
    positions = mrope_positions([4, (1, 18, 24), 3])  # <|im_start|>user\n<|vision_start|>, 9x12 merged, the rest
    assert positions[:, :4].tolist() == [[0, 1, 2, 3]] * 3
    assert positions[:, [4, 4 + 12, 4 + 107]].T.tolist() == [[4, 4, 4], [4, 5, 4], [4, 12, 15]]
    assert positions[:, 4 + 108 :].tolist() == [[16, 17, 18]] * 3


def test_empty_sequence_has_no_positions():
    assert mrope_positions([]).shape == (3, 0)


def test_equal_to_transformers_on_every_kind_of_sample(make_oracle):
    folder = make_oracle(vision_depth=24, tie=True, dialect="published")
    model = oracles.oracle(folder)
    collate = MultimodalCollator.from_pretrained(folder)
    for name, sample in oracles.conversations().items():
        inputs = oracles.oracle_inputs(folder, sample["messages"])
        theirs, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        assert torch.equal(collate([sample]).positions, theirs[:, 0]), name


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_transformers_on_random_runs(make_oracle, seed):
    folder = make_oracle(vision_depth=24, tie=True, dialect="published")
    model = oracles.oracle(folder)
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    runs, kinds = [], []
    for _ in range(number(6)):
        grid = (1, 2 * number(9), 2 * number(9))
        runs += [number(20), grid]
        kinds += [0] * runs[-2] + [1] * (grid[1] * grid[2] // 4)
    grids = torch.tensor([run for run in runs if not isinstance(run, int)])
    theirs, _ = model.model.get_rope_index(torch.zeros(1, len(kinds), dtype=torch.int64), torch.tensor([kinds]), grids)
    assert torch.equal(mrope_positions(runs), theirs[:, 0])
