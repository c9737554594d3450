"""What programs written against OpenAI do, done to the node whose base URL is the argument."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", timeout=100, max_retries=0)
hello = [{"role": "user", "content": "Say hello."}]

models = client.models.list().data
model = models[0].id
print("model:", model)
assert client.models.retrieve(model).id == model

plain = client.chat.completions.create(model=model, messages=hello, max_tokens=12, temperature=0)
text = plain.choices[0].message.content
print("plain:", text)
assert text and plain.choices[0].message.role == "assistant"
assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens

chunks = list(
    client.chat.completions.create(
        model=model,
        messages=hello,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage
assert all(chunk.usage is None for chunk in chunks[:-1])

short = client.chat.completions.create(model=model, messages=hello, max_completion_tokens=2, temperature=0)
assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
assert text.startswith(short.choices[0].message.content)

word = text.split()[1]
stopped = client.chat.completions.create(model=model, messages=hello, max_tokens=12, temperature=0, stop=[word])
assert stopped.choices[0].finish_reason == "stop"
assert stopped.choices[0].message.content == text[: text.index(word)]


def drawn(seed):
    answer = client.chat.completions.create(model=model, messages=hello, max_tokens=12, temperature=1.5, seed=seed)
    return answer.choices[0].message.content


assert drawn(7) == drawn(7)
assert len({drawn(seed) for seed in range(3)}) > 1

try:
    client.chat.completions.create(model=model + "x", messages=hello)
    raise AssertionError("an unknown model answers")
except openai.NotFoundError as error:
    assert error.code == "model_not_found" and model in error.message, error

try:
    client.chat.completions.create(model=model, messages=hello, logprobs=True)
    raise AssertionError("an unsupported field is ignored")
except openai.BadRequestError as error:
    assert error.param == "logprobs", error

# Leave in the middle: the node notices (its test looks), and answers the next request.
stream = client.chat.completions.create(model=model, messages=hello, max_tokens=1000, temperature=1, stream=True)
next(iter(stream))
stream.close()
assert client.chat.completions.create(model="default", messages=hello, max_tokens=2).choices
print("all well")
