"""An application that calls two model APIs through their SDKs, with and without streaming; it knows nothing of OTLP.

opentelemetry-instrument python genai_client.py API_URL
"""

import sys
from typing import Any

import anthropic
import openai
from opentelemetry import trace

QUESTION: Any = [{"role": "user", "content": "a secret question"}]


def main(url: str) -> None:
    with trace.get_tracer("application").start_as_current_span("answer a question"):
        call_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
        call_anthropic(anthropic.Anthropic(base_url=url, api_key="none", max_retries=0))


def call_openai(client: Any) -> None:
    client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    options = {"include_usage": True}
    for _ in client.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=True, stream_options=options):
        pass
    client.embeddings.create(model="text-embedding-3-small", input="a secret text")


def call_anthropic(client: Any) -> None:
    asked = {"model": "claude-sonnet-4-5", "max_tokens": 50, "messages": QUESTION}
    client.messages.create(**asked)
    for _ in client.messages.create(**asked, stream=True):
        pass
    with client.messages.stream(**asked) as stream:
        stream.get_final_message()


if __name__ == "__main__":
    main(*sys.argv[1:])
