"""train.py, batches: which tokens the model is fed, which it learns, and which see which."""

import pytest
import torch
from support.training import (
    ASK,
    END,
    MARKER,
    SYSTEM,
    about,
    draw_row,
    encode_plainly,
    largest_difference,
    make_samples,
    model_inputs,
    open_images,
    plain_losses,
    record,
    save_noise,
    take_gradients,
)


@pytest.fixture
def samples(train, exact, image_folder):
    """A function from records about the images of image_folder to samples."""

    def samples(*records: dict) -> list[dict]:
        return make_samples(train, exact, image_folder, *records)

    return samples


# ---- Tokens


def test_a_batch_token_by_token(collator, samples):
    """Captions of an image share its row, and nothing but them is learned, each with its end.

    Otherwise a prompt is learned, an end is not, or a caption stands in another image's row.
    """
    batch = collator.make_pass(
        samples(
            about("one.jpg", "a red star"),
            about("two.jpg", "a large pink circle on a black background"),
            about("one.jpg", "red star"),
        )
    )
    first, second = (draw_row(collator, batch, row).lstrip("_") for row in (0, 1))
    prompt = f"{SYSTEM}请描述这张图片: <|vision_start|>x16<|vision_end|>{ASK}"
    assert first == f"{prompt}[[a red star{END}]]\n[[red star{END}]]"
    assert second == f"{prompt}[[a large pink circle on a black background{END}]]"


def test_a_conversation_token_by_token(collator, samples):
    """Each answer is learned in a row of its own, with all that was said before as its prompt."""
    image = MARKER.format("one.jpg")
    talk = record(f"{image}What is it?", "a star", "And the colour?", "red", "Sure?", "yes")
    batch = collator.make_pass(samples(talk))
    asked = f"{SYSTEM}<|vision_start|>x16<|vision_end|>What is it?{ASK}"
    again = f"{asked}a star{END}\n<|im_start|>user\nAnd the colour?{ASK}"
    thrice = f"{again}red{END}\n<|im_start|>user\nSure?{ASK}"
    rows = [draw_row(collator, batch, row).lstrip("_") for row in range(3)]
    expected = [f"{asked}[[a star{END}]]", f"{again}[[red{END}]]", f"{thrice}[[yes{END}]]"]
    assert rows == expected


def test_answers_are_learned_letter_for_letter(collator, samples):
    """Quotes, commas, line breaks, Chinese and emoji are learned as they stand in the JSON."""
    caption = 'Er sagt "ja",\n\n  两只猫 🐈 <not a tag> \\n'
    [labels] = collator.make_pass(samples(about("one.jpg", caption)))["labels"]
    assert collator.base.processor.decode(labels[labels != -100]) == caption + END


def test_rows_are_padded_to_a_multiple_of_8(train, collator, samples):
    """T is a multiple of 8, padding stands on the left. Otherwise attention copies every mask."""
    for words in range(1, 10):
        data = samples(about("one.jpg", "star " * words), about("two.jpg", "x"))
        batch = collator.make_pass(data)
        longest = max(len(sample["prompt"]) + len(sample["answers"][0]) for sample in data)
        assert batch["input_ids"].shape == (2, -(-longest // 8) * 8)
    padded = train.pad_left((torch.tensor([1, 2]), torch.arange(9)), -7)
    assert padded[0].tolist() == [-7] * 14 + [1, 2]
    assert padded[1].tolist() == [-7] * 7 + list(range(9))


def test_the_real_vocabulary_gives_the_golden_ids(train, exact, model, image_folder, monkeypatch):
    """The ids are those that transformers 4 gave for the published chat template.

    Otherwise the real model is trained on a prompt that it has never seen.
    """
    from support.vocabulary import real_processor

    monkeypatch.setattr(train, "IMAGE_SIZE", 280)
    real = exact._replace(processor=real_processor(exact.processor))
    question = record(MARKER.format("one.jpg") + "COCO Yes:", "A cat on a mat.")
    [sample] = make_samples(train, real, image_folder, question)
    batch = train.Collator(real, train.KeptFeatures(real), model).make_pass([sample])
    ids = batch["input_ids"][0].tolist()
    ids = ids[ids.index(151644) :]  # without the padding
    assert ids.count(151655) == 100
    first = ids.index(151655)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [151644, 872, 198, 151652, 151655, 151653, 34, 7612, 46, 7414, 25, 151645, 198]
    assistant = [151644, 77091, 198]
    answer = [32, 8251, 389, 264, 5517, 13, 151645]
    assert ids[: first + 1] + ids[first + 100 :] == system + user + assistant + answer
    assert [label for label in batch["labels"][0].tolist() if label != -100] == answer
    [image] = train.images_of(sample)
    pixels, grid = train.prepare_pixels(image, real)
    assert pixels.shape == (400, 1176) and grid.tolist() == [[1, 20, 20]]


# ---- Positions, mask and loss


def test_who_sees_whom(train, collator, samples):
    """A caption sees the prompt and itself, not the other captions, and continues at its position.

    Otherwise a caption copies another one of its image, and learns nothing from the image.
    """
    data = samples(about("one.jpg", "red"), about("one.jpg", "star"), about("two.jpg", "x"))
    batch = collator.make_pass(data)
    inputs = model_inputs(collator, batch)
    owners = batch["owners"][0].tolist()
    first, second = owners.index(1), owners.index(2)  # the line breaks before the two captions
    prompt = owners.index(0)  # behind the padding
    sees = inputs["attention_mask"][0, 0]  # (T, T)
    assert sees[first:second, prompt:first].all(), "the first caption sees the prompt"
    assert sees[second:, prompt:first].all(), "the second caption sees the prompt"
    assert sees[first, first] and sees[second:, second].all(), "each sees its own beginning"
    assert not sees[second:, first:second].any(), "the second caption does not see the first"
    assert not sees.triu(1).any(), "nobody sees the future"
    for row, padding in enumerate((batch["owners"] == train.PADDING).sum(1).tolist()):
        sees = inputs["attention_mask"][row, 0]
        assert padding > 0 and not sees[padding:, :padding].any(), "nobody sees padding"
        assert sees.diagonal().all(), "a row without any True would turn into NaN"
    positions = batch["position_ids"][:, 0]  # (3, T)
    assert positions[:, first].tolist() == positions[:, second].tolist()
    assert (positions[:, first] == positions[:, first - 1] + 1).all()
    assert inputs["attention_mask"].shape == (2, 1, len(owners), len(owners))


TALK = record(MARKER.format("two.jpg") + "What is it?", "a circle", "And the colour?", "pink")


def test_loss_and_gradients_equal_the_plain_forward(
    train, exact, model, whole_model, collator, samples
):
    """Shared prompts give loss and gradients of separate rows with pixels, in the whole model.

    Positions, mask, label shift, kept logits and features: off by one anywhere, this fails.
    """
    data = samples(
        about("one.jpg", "a red star"),
        about("one.jpg", "one big star in front of blue"),
        about("one.jpg", "star"),
        about("two.jpg", "a small circle"),
        TALK,
    )
    assert [len(sample["answers"]) for sample in data] == [3, 1, 1, 1]
    batch = collator.make_pass(data)
    inputs = model_inputs(collator, batch)
    count = batch["shift_labels"].numel()
    loss = model(**inputs, num_items_in_batch=count).loss
    loss.backward()
    shared = take_gradients(model)
    plain = plain_losses(train, exact, whole_model, data, count)
    plain.backward()
    separate = take_gradients(whole_model)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert largest_difference(shared, separate) < 1e-5
    # Two mistakes, to see that the tolerance finds them: both are a hundred times outside of it
    causal = torch.ones_like(inputs["attention_mask"]).tril()
    late = inputs["logits_to_keep"].roll(1, 1)
    for mistake in ({"attention_mask": causal}, {"logits_to_keep": late}):
        wrong = model(**{**inputs, **mistake}, num_items_in_batch=count).loss
        assert abs(wrong.item() - loss.item()) > 1e-3, list(mistake)


def test_a_conversation_as_the_chat_template_writes_it(
    train, exact, model, whole_model, collator, samples
):
    """The examples of a conversation have the probabilities that its tokens have in one row.

    That row is the chat template's own text of the whole conversation, encoded at once.
    """
    texts = [
        MARKER.format("one.jpg") + "What is it?",
        "a star",
        "Like this? " + MARKER.format("two.jpg"),
        "no",
        "And the colours?",
        "one is red, the other pink",
    ]
    data = samples(record(*texts))
    batch = collator.make_pass(data)
    logits = model(**model_inputs(collator, batch)).logits  # (N, vocabulary)
    ours = logits.log_softmax(-1).gather(1, batch["shift_labels"][:, None])[:, 0]

    messages = []
    for number, text in enumerate(texts):
        text = text.replace("one.jpg", "<|image_pad|>").replace("two.jpg", "<|image_pad|>")
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    whole = exact.processor.apply_chat_template(messages, tokenize=False)
    images = open_images(train, data[-1])
    inputs = exact.processor(text=[whole], images=images, do_resize=False, return_tensors="pt")
    scores = whole_model(**inputs, use_cache=False).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    expected = []
    for sample in data:
        start, [answer] = len(sample["prompt"]), sample["answers"]
        assert ids[: start + len(answer)] == sample["prompt"] + answer
        for place, token in enumerate(answer, start=start):
            expected.append(scores[place - 1, token].item())
    assert ours.tolist() == pytest.approx(expected, abs=1e-9)


def test_images_of_many_sizes_share_a_batch(
    train, exact, model, whole_model, collator, samples, image_folder, monkeypatch
):
    """Each image has its own tokens in its own place, also where a question has two images.

    No image is opened any more once the tower has seen it.
    """
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    monkeypatch.setattr(train, "MAX_PIXELS", 12 * 28 * 28)
    save_noise(image_folder / "wide.jpg", (300, 90))
    question = MARKER.format("wide.jpg") + " or " + MARKER.format("one.jpg") + "?"
    data = samples(about("wide.jpg", "noise"), about("one.jpg", "a star"), record(question, "both"))
    wide, square, both = (train.images_of(sample) for sample in data)
    assert both == wide + square and (wide[0].height, wide[0].width) != (square[0].height,) * 2
    batch = collator.make_pass(data)
    tokens = (batch["input_ids"] == exact.processor.image_token_id).sum(1).tolist()
    sizes = [sum(image.height * image.width // 28**2 for image in row) for row in (wide, square)]
    assert tokens == [*sizes, sum(sizes)] and len(set(tokens)) == 3
    count = batch["shift_labels"].numel()
    loss = model(**model_inputs(collator, batch), num_items_in_batch=count).loss
    plain = plain_losses(train, exact, whole_model, data, count)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    for path in image_folder.glob("*.jpg"):
        path.unlink()
    again = collator.make_pass(data)
    assert all(torch.equal(again[name], batch[name]) for name in set(batch) - {"names"})


def test_a_caption_is_asked_for_as_it_was_learned(collator, samples):
    """Training and captioning share ids, features and positions up to the first new token."""
    data = samples(about("one.jpg", "a red star"), about("two.jpg", "x", "What is it?"))
    learning = collator.make_pass(data)
    asking = collator.make_batch(data, with_answers=False)
    assert torch.equal(learning["features"], asking["features"])
    assert asking["labels"].eq(-100).all()
    for row, sample in enumerate(data):
        start = learning["owners"][row].tolist().index(0)
        length = len(sample["prompt"])
        asked = asking["owners"][row].tolist().index(0)
        assert asking["input_ids"][row, asked:].tolist() == sample["prompt"]
        learned_from = learning["input_ids"][row, start : start + length]
        assert learned_from.tolist() == sample["prompt"]
        positions = learning["position_ids"][:, row, start : start + length]
        assert torch.equal(positions, asking["position_ids"][:, row, asked:])
        labels = learning["labels"][row, start:]
        assert labels[:length].eq(-100).all() and labels[length] >= 0


def test_positions_are_those_of_the_model(train, exact, whole_model, collator, samples):
    """Positions of a prompt are what the model itself finds for the processor's own inputs."""
    data = samples(about("one.jpg", "a red star"))
    inputs = encode_plainly(train, exact, data[0])
    del inputs["pixel_values"]
    positions, _ = whole_model.get_base_model().model.get_rope_index(**inputs)
    batch = collator.make_batch(data, with_answers=False)
    start = batch["owners"][0].tolist().index(0)
    assert torch.equal(batch["position_ids"][:, :, start:], positions)


# ---- Passes


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_step_is_cut_into_passes(train, model, collator, samples, size, monkeypatch):
    """BATCH_SIZE changes neither what a step sees nor its loss, also where captions differ.

    Otherwise a run resumed on another GPU would learn something else.
    """
    data = samples(
        about("one.jpg", "a red star"),
        about("one.jpg", "star"),
        about("two.jpg", "one large pink circle in front of a black background"),
        TALK,
    )
    monkeypatch.setattr(collator, "batch_size", size)
    step = collator(data)
    lengths = [len(each["input_ids"]) for each in step["passes"]]
    assert sum(lengths) == len(data) and max(lengths) <= size
    count = step["labels"].numel()
    assert count == sum(sample["learned"] for sample in data)
    assert torch.equal(step["labels"], step["shift_labels"])
    names = sum((each["names"] for each in step["passes"]), [])
    assert [name.rpartition("/")[2] for name in names] == ["one.jpg"] + ["two.jpg"] * 3
    losses = []
    for each in step["passes"]:
        losses.append(model(**model_inputs(collator, each), num_items_in_batch=count).loss)
    whole = model(**model_inputs(collator, collator.make_pass(data)), num_items_in_batch=count).loss
    assert sum(losses).item() == pytest.approx(whole.item(), abs=1e-5)


def test_features_that_do_not_fit_are_refused(collator, samples, monkeypatch):
    """Other features than image tokens are an error. Otherwise words of one image fit another."""
    [sample] = samples(about("one.jpg", "a red star"))
    read = collator.features.read
    monkeypatch.setattr(collator.features, "read", lambda images: read(images)[:-1])
    with pytest.raises(ValueError, match="image tokens and kept features do not match"):
        collator.make_pass([sample])
