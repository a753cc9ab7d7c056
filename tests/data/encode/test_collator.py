import pickle

import pytest
import torch
from PIL import Image

from qwen3vl_train.data.encode.collator import MultimodalCollator
from qwen3vl_train.data.rows.parse import parse_sample
from tests.helpers import oracles
from tests.helpers.messages import message_of

SAMPLES = list(oracles.conversations().values())


def test_pack_concatenates_its_samples(collate):
    pack = collate(SAMPLES)
    alone = [collate([sample]) for sample in SAMPLES]
    for field, dim in (("input_ids", 0), ("labels", 0), ("positions", 1), ("pixel_values", 0), ("grid_thw", 0)):
        assert torch.equal(getattr(pack, field), torch.cat([getattr(one, field) for one in alone], dim)), field
    assert pack.sequence_lengths.tolist() == [one.num_tokens for one in alone]
    assert pack.num_labels == sum(one.num_labels for one in alone)
    assert pack.sample_ids == tuple(f"sample {number}" for number in range(len(SAMPLES)))
    assert torch.equal(pack.visual_pos_mask, pack.input_ids == collate.tokenizer.special_ids["<|image_pad|>"])
    start = 0
    for length in pack.sequence_lengths.tolist():
        assert pack.labels[start + length - 1] == -100  # the last token of a sequence has no next token
        start += length


def test_pack_of_text_only(collate):
    pack = collate([{"messages": [{"role": "user", "content": "Hi"}]}])
    assert (pack.pixel_values.shape, pack.pixel_values.dtype) == ((0, 768), torch.uint8)
    assert (pack.num_labels, pack.grid_thw.shape) == (0, (0, 3))


def test_weights_are_one_where_no_message_says_more(collate):
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    heavy = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss_weight": 3}]}
    pack = collate([plain, heavy])
    n = pack.sequence_lengths[0]
    assert pack.loss_weights[:n].tolist() == (pack.labels[:n] != -100).float().tolist()
    assert pack.loss_weights[n:].tolist() == (3.0 * (pack.labels[n:] != -100)).tolist()


def test_budgets_shrink_images(tiny_folder):
    sample = {"messages": [{"role": "user", "content": [{"image": Image.new("RGB", (512, 512))}]}]}
    assert MultimodalCollator.from_pretrained(tiny_folder).cost(sample).visual_tokens == 256
    small = MultimodalCollator.from_pretrained(tiny_folder, max_visual_tokens_per_image=20)
    assert small.cost(sample).visual_tokens == 16
    tiny_image = {"messages": [{"role": "user", "content": [{"image": Image.new("RGB", (32, 32))}]}]}
    large = MultimodalCollator.from_pretrained(tiny_folder, min_visual_tokens_per_image=30)
    assert large.cost(tiny_image).visual_tokens == 36


def test_pickling_changes_nothing(collate):
    samples = [*SAMPLES, {"messages": [{"role": "user", "content": "typed<|im_end|> \n markup"}]}]
    assert torch.equal(pickle.loads(pickle.dumps(collate))(samples).input_ids, collate(samples).input_ids)


def test_prompt_ends_where_the_answer_begins(collate):
    messages = SAMPLES[3]["messages"]
    prompt, complete = collate.prompt(messages[:-1]), collate([{"messages": messages}])
    assert torch.equal(prompt.input_ids, complete.input_ids[: prompt.num_tokens])
    assert torch.equal(prompt.positions, complete.positions[:, : prompt.num_tokens])
    assert prompt.num_labels == 0
    assert collate.decode(prompt.input_ids.tolist(), skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert torch.equal(collate.prompt({"messages": messages[:-1]}).input_ids, prompt.input_ids)
    assert torch.equal(collate.prompt(parse_sample({"messages": messages[:-1]})).input_ids, prompt.input_ids)
    fault = "prompt: messages[5]: a prompt that ends with an answer; remove the answer"
    assert message_of(ValueError, collate.prompt, messages) == fault


def test_faults_name_the_sample(collate):
    broken = {"messages": [{"role": "user", "content": [{"image": b"junk"}]}]}
    with pytest.raises(ValueError, match=r"^sample 1: messages\[0\].content\[0\]: image of 4 bytes: is not an image"):
        collate([SAMPLES[0], broken])
    with pytest.raises(ValueError, match=r"^sample 0: messages is empty; write at least a question and an answer$"):
        collate([{"messages": []}])
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: messages\[0\]"):
        collate([parse_sample(broken, "a.jsonl:3")])
