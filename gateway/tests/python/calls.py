"""Calls an API with its own SDK and prints the outcome of each call as JSON.

    calls.py BASE_URL TOKEN RETRIES CALL…

A call is the name of a function below, which returns the text of the response.
"""

import json
import sys

import anthropic
import openai

base_url, token, retries, *calls = sys.argv[1:]
of_openai = openai.OpenAI(base_url=f"{base_url}/v1", api_key=token, max_retries=int(retries))
of_anthropic = anthropic.Anthropic(base_url=base_url, api_key=token, max_retries=int(retries))

question = {"model": "a-model", "messages": [{"role": "user", "content": "Hello?"}]}
long_question = {"model": "a-model", "messages": [{"role": "user", "content": "Hello? " * 1_000_000}]}


def chat(question=question):
    return of_openai.chat.completions.create(**question).choices[0].message.content


def chat_long():
    return chat(long_question)


def chat_stream():
    chunks = of_openai.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def responses():
    return of_openai.responses.create(model="a-model", input="Hello?").output_text


def responses_stream():
    events = of_openai.responses.create(model="a-model", input="Hello?", stream=True)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def models():
    return " ".join(model.id for model in of_openai.models.list())


def message(question=question):
    return of_anthropic.messages.create(**question, max_tokens=100).content[0].text


def message_long():
    return message(long_question)


def message_stream():
    with of_anthropic.messages.stream(**question, max_tokens=100) as stream:
        return "".join(stream.text_stream)


def outcome(call):
    try:
        return {"text": globals()[call]()}
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        return {
            "error": f"{type(error).__module__.split('.')[0]}.{type(error).__name__}",
            "status": error.status_code,
            "message": error.message,
            "retry_after": error.response.headers.get("retry-after"),
        }
    except (openai.OpenAIError, anthropic.AnthropicError) as error:
        return {"error": type(error).__name__, "message": str(error)}


json.dump([outcome(call) for call in calls], sys.stdout)
