"""One answer from llama.cpp, which runs inside of this process (pip install -r requirements-peers.txt).

python -m examples.llama_cpp out/demo-dpo-gguf-q8_0/demo-dpo-gguf-q8_0.gguf "How many seconds are 4 minutes?"
"""

import sys

from bench.peers import llama_server

if __name__ == "__main__":
    file, question = sys.argv[1:]
    ask = llama_server(file)
    messages = [{"role": "user", "content": question}]
    answer = ask("v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 256})
    print(answer["choices"][0]["message"]["content"])
