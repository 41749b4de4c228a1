"""Text from a model, in the three shapes that the API has: answers, a stream, token ids.

python examples/generate.py [MODEL]
"""

import sys

import effc
import torch


def main(model: str = "smollm2") -> None:
    llm = effc.LLM(model)

    for answer in llm.generate(["What is the capital of France?", "Name a color."], chat=True, max_new_tokens=16):
        print(f"{answer.text!r}, ended by {answer.finish_reason}")

    for piece in llm.stream("Once upon a time", temperature=0.8, top_p=0.9, seed=1, max_new_tokens=24):
        print(piece, end="", flush=True)
    print()

    program = llm.program  # what effc.compile(model) gives
    input_ids = torch.tensor([llm.encode("One, two, three,")])
    logits = program(input_ids)  # [1, S, V]
    new_ids = program.generate(input_ids, max_new_tokens=8)[0, input_ids.shape[1] :]
    print(f"logits {list(logits.shape)}, then {llm.codec.decode(new_ids.tolist())!r}")
    print(program)


if __name__ == "__main__":
    main(*sys.argv[1:])
