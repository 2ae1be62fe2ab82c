"""The report as one page: plain language, tables and plots, nothing fetched from elsewhere."""

import html
from typing import Any

from dpfa_jax.train import figures
from dpfa_jax.train.options import option_rows
from dpfa_jax.train.page_style import STYLE
from dpfa_jax.train.progress import clock

Report = dict[str, Any]


def render(report: Report) -> str:
    """HTML of a report as `report.make_report` builds it."""
    sections = [
        _banner(report),
        _summary(report),
        _cards(report),
        _plots(report),
        _promise(report),
        _limits(report),
        _choice(report),
        _run(report),
        _ledger(report),
    ]
    title = f"Private training on {html.escape(report['data']['name'])}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p class='kicker'>DP-Flash-Attention · training report</p><h1>{title}</h1>"
        f"</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _banner(report: Report) -> str:
    warnings = []
    if report["insecure_test_noise"]:
        warnings.append(
            "<strong>INSECURE.</strong> The noise of this run came from a test seed. The model "
            "protects nobody; the figures below only show what a real run would look like."
        )
    if not report["finished"]:
        warnings.append(
            "<strong>Stopped early.</strong> The run was interrupted. What it released so far is "
            "charged; go on with <code>--resume</code>."
        )
    return "".join(f"<p class='banner'>{text}</p>" for text in warnings)


def _summary(report: Report) -> str:
    data, epsilon = report["data"], report["epsilon_nominal"]
    return (
        f"<p class='lead'>A small {html.escape(report['model']['name'])} model learned to tell "
        f"{len(data['class_names'])} classes apart from {data['examples']:,} examples. It answers "
        f"<strong>{_percent(report['accuracy'])}</strong> of {data['test_examples']:,} held-out "
        f"examples right{_caution(report)}.</p><p>What the model can give away about any one "
        "training example is bounded: adding or removing that example changes the probability of "
        f"anything that could be seen in it by a factor of at most e<sup>{epsilon:.2f}</sup> = "
        f"{_odds(epsilon)}, apart from a chance of {_power(report['delta'])}.</p>"
    )


def _caution(report: Report) -> str:
    if report["accuracy"] > report["accuracy_majority"]:
        return ""
    return ", which is no better than always naming one class: it did not learn"


def _cards(report: Report) -> str:
    twin = report["accuracy_nonprivate"]
    cards = [
        (
            "ε spent",
            f"{report['epsilon_nominal']:.2f}" if report["epsilon"] is not None else "∞",
            f"budget {report['epsilon_budget']:g}, δ = {_power(report['delta'])}",
        ),
        ("accuracy", _percent(report["accuracy"]), "held-out, private model"),
        (
            "without privacy",
            "—" if twin is None else _percent(twin),
            "not asked for" if twin is None else "same model, same steps",
        ),
        ("always one class", _percent(report["accuracy_majority"]), "the commonest held-out one"),
    ]
    items = "".join(
        f"<div class='card'><span>{name}</span><b>{value}</b><small>{note}</small></div>"
        for name, value, note in cards
    )
    return f"<div class='cards'>{items}</div>"


def _plots(report: Report) -> str:
    history, twin = report["history"], report["history_nonprivate"]
    plots = [
        (
            "Accuracy",
            figures.accuracy_figure(history, twin, report["accuracy_majority"]),
            _looked_at(report),
        ),
        (
            "Loss",
            figures.loss_figure(history, twin),
            "Mean cross-entropy on held-out examples. The training loss is private and is not "
            "computed. So is the share of clipped gradients: it is left out on purpose.",
        ),
        (
            "Privacy budget spent",
            figures.epsilon_figure(history, report["epsilon_budget"]),
            "An upper bound at every step; steps are charged before they run. The end point is "
            "exact to the accountant's error.",
        ),
    ]
    return "".join(
        f"<section><h2>{name}</h2><figure>{plot}<figcaption>{text}</figcaption></figure></section>"
        for name, plot, text in plots
    )


def _looked_at(report: Report) -> str:
    some, every = report["look_examples"], report["data"]["test_examples"]
    text = "Measured on held-out examples while the model was trained"
    if some < every:
        text += f", on the first {some:,} of them; the figures above are over all {every:,}"
    if report["accuracy_nonprivate"] is None:
        text += (
            ". The same model without privacy was not trained, so no curve compares; "
            "<code>--nonprivate-twin</code> adds it"
        )
    return text + "."


def _promise(report: Report) -> str:
    release = report["release"]
    rows = [
        ("epsilon (PLD accountant)", f"{report['epsilon_nominal']:.4f}"),
        ("epsilon (RDP accountant, looser)", f"{report['epsilon_rdp']:.4f}"),
        ("delta", _power(report["delta"])),
        ("protects", f"{release['unit']}, added or removed"),
        ("released", "every iterate of the model's parameters"),
        ("noise multiplier", f"{release['noise_multiplier']:.4f}"),
        *option_rows(report["options"]),
        ("numbers in one release", f"{release['dimension']:,}"),
        (
            "batches",
            f"Poisson, {release['sampling']['expected_batch_size']:,} expected, at most "
            f"{release['sampling']['truncated_batch_size']:,} of "
            f"{release['sampling']['dataset_size']:,}",
        ),
        ("noise generator", html.escape(release["generator"])),
    ]
    note = report["epsilon_note"]
    said = "" if note is None else f"<p>{html.escape(note)}.</p>"
    return f"<section><h2>What is promised</h2>{said}{_table(rows)}</section>"


def _limits(report: Report) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in report["does_not_protect"])
    return (
        "<section><h2>What is not protected</h2><p>The promise covers the training examples, in "
        f"the model. It does not cover:</p><ul>{items}</ul></section>"
    )


def _choice(report: Report) -> str:
    return (
        "<section><h2>What the choice of settings would cost</h2>"
        f"<p>{html.escape(report['choice_cost']['text'])}</p></section>"
    )


def _run(report: Report) -> str:
    lost = min(report["steps_charged"], report["steps_planned"]) - report["steps"]
    rows = [
        ("steps", f"{report['steps']:,}" + (f" ({lost} more charged, but lost)" if lost else "")),
        ("parameters trained", f"{report['model']['parameters']:,}"),
        ("time in steps", f"{clock(report['seconds'])} (min:s)"),
        ("examples per second, expected", f"{report['examples_per_second']:,.0f}"),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("signal over noise, at best", f"{report['signal_to_noise']:.1f}"),
        ("device", html.escape(report["device"])),
        *((html.escape(name), html.escape(text)) for name, text in report["versions"].items()),
    ]
    settings = [
        (html.escape(name.replace("_", " ")), html.escape(str(value)))
        for name, value in report["settings"].items()
    ]
    return (
        f"<section><h2>The run</h2>{_table(rows)}"
        f"<details><summary>All settings</summary>{_table(settings)}</details></section>"
    )


def _ledger(report: Report) -> str:
    ledger = report["ledger"]
    return (
        "<section><h2>The ledger</h2><p>Every step was charged in <code>ledger.jsonl</code> before "
        f"it ran, {report['steps_charged']:,} in all. Check it with <code>dpfa account</code> and "
        "the path of this folder (after <code>make train</code>: <code>.venv/bin/dpfa account"
        "</code>). Each line is bound to the one before it; the "
        f"last one's hash is</p><p><code class='hash'>{html.escape(ledger['head'])}</code></p>"
        "</section>"
    )


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<div class='table'><table><tbody>{body}</tbody></table></div>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%"


def _odds(epsilon: float) -> str:
    return f"{2.718281828459045**epsilon:,.1f}" if epsilon < 50 else "more than anyone can use"


def _power(number: float) -> str:
    mantissa, exponent = f"{number:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    times = "" if mantissa == "1" else f"{mantissa}&nbsp;·&nbsp;"
    return f"{times}10<sup>{int(exponent)}</sup>"
