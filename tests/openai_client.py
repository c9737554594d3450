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

likely = client.chat.completions.create(
    model=model, messages=hello, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
)
tokens = likely.choices[0].logprobs.content
assert b"".join(bytes(token.bytes) for token in tokens).decode() == likely.choices[0].message.content == text
for token in tokens:
    assert token.logprob <= 0 and len(token.top_logprobs) == 3
    # Greedy: the chosen token is the likeliest.
    assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
    assert sum(2.718281828**other.logprob for other in token.top_logprobs) <= 1.00001
streamed = client.chat.completions.create(
    model=model, messages=hello, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3, stream=True
)
assert [t for c in streamed if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content] == tokens


def biased(bias, **more):
    answer = client.chat.completions.create(
        model=model, messages=hello, max_tokens=4, temperature=0, logit_bias=bias, logprobs=True, extra_body=more
    )
    return answer.choices[0].logprobs.content


forced = biased({"300": 100})
assert len(forced) == 4 and len({token.token for token in forced}) == 1 and forced[0].token != tokens[0].token
# A token once said becomes less likely than others.
assert len({token.token for token in biased({"300": 5}, repetition_penalty=5, top_k=50, min_p=0.01)}) > 1

try:
    client.chat.completions.create(model=model, messages=hello, logit_bias={"4000000": 1})
    raise AssertionError("a token that does not exist is biased")
except openai.BadRequestError as error:
    assert error.param == "logit_bias", error

try:
    client.chat.completions.create(model=model, messages=hello, extra_body={"grammar": "root ::= x"})
    raise AssertionError("an unsupported field is ignored")
except openai.BadRequestError as error:
    assert error.param == "grammar", error

# Embeddings, where the node has a model for them: its name is the second argument.
if len(sys.argv) > 2:
    texts = ["hello world", "the house"]
    # Without a format the library asks for base64 and unpacks it.
    packed = client.embeddings.create(model=sys.argv[2], input=texts)
    plain = client.embeddings.create(model=sys.argv[2], input=texts, encoding_format="float")
    vectors = [row.embedding for row in packed.data]
    assert [row.index for row in packed.data] == [0, 1] and packed.model == sys.argv[2]
    for one, other in zip(vectors, (row.embedding for row in plain.data), strict=True):
        assert all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
        assert abs(sum(x * x for x in one) - 1) < 1e-4
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == plain.usage.prompt_tokens > 4
    alone = client.embeddings.create(model="default", input=texts[1], user="me")
    assert alone.data[0].embedding == vectors[1]
    ids = client.embeddings.create(model=sys.argv[2], input=[[2, 52, 53, 3], [5]])
    assert ids.data[0].embedding == vectors[0]
    for wrong, param in [({"input": "x", "dimensions": 2}, "dimensions"), ({"input": ["a", "b " * 9000]}, "input[1]")]:
        try:
            client.embeddings.create(model=sys.argv[2], **wrong)
            raise AssertionError("what cannot be embedded is embedded")
        except openai.BadRequestError as error:
            assert error.param == param, error

# Leave in the middle: the node notices (its test looks), and answers the next request.
stream = client.chat.completions.create(model=model, messages=hello, max_tokens=1000, temperature=1, stream=True)
next(iter(stream))
stream.close()
assert client.chat.completions.create(model="default", messages=hello, max_tokens=2).choices
print("all well")
