"""Greedy text from a graph exported with --embed-weights: onnxruntime, numpy and nothing else."""

import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("build/nano.plain/model.onnx", providers=["CPUExecutionProvider"])
outputs = [output.name for output in session.get_outputs()]  # logits, then the next value of each state
capacity = 1024  # tokens; a state of C4 rows holds one row per 4 of them
state = {}
for value in session.get_inputs()[3:]:  # after input_ids, start_pos and num_tokens
    slots, rows, width = value.shape
    state[value.name] = np.zeros(
        (1, capacity // int(rows[1:]) if isinstance(rows, str) else rows, width), "f4"
    )
chunk, position, text = [0, 1143, 260, 806, 266, 1267], 0, []  # <bos>In the beginning
for _ in range(40):
    feed = {"input_ids": np.array([chunk]), "start_pos": np.array([position], "i4")}
    logits, *after = session.run(None, feed | {"num_tokens": np.array([len(chunk)], "i4")} | state)
    state = {name.replace("next.", "state."): array for name, array in zip(outputs[1:], after, strict=True)}
    position, chunk = position + len(chunk), [int(logits[0].argmax())]
    text += chunk
print(text)
