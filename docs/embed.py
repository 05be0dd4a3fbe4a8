"""Several prompts at once on one model: a session, an engine loop, and sampled, constrained answers."""

from v4graph_runtime import PrefixCache, SamplingOptions, Session, Tokenizer
from v4graph_runtime.serving import Constraint, Engine, RequestOptions

directory, checkpoint = "build/nano.engine", "models/nano"
with (
    Session(directory, checkpoint, batch=4) as session,
    Engine(session, Tokenizer.load(directory, checkpoint), cache=PrefixCache()) as engine,
):
    sampled = RequestOptions(max_new_tokens=40, sampling=SamplingOptions(0.8, top_p=0.95, seed=1))
    number = RequestOptions(max_new_tokens=8, constraint=Constraint("regex", "[0-9]{2,4}"))
    waiting = [engine.submit("In the beginning", sampled), engine.submit("And the LORD said", sampled)]
    waiting.append(engine.submit("And all the days of Noah were", number))
    for piece in waiting[0]:  # the others go on meanwhile
        print(piece.text, end="", flush=True)
    print([generation.text() for generation in waiting[1:]])
    again = engine.generate("In the beginning God", sampled)
    print(again.text(), again.cached_tokens, engine.stats().generated_tokens)
