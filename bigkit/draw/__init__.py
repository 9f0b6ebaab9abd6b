"""Pictures: pure functions from data to a `Picture`, each with a text twin that tells the same figures.

A picture is a list of boxes, lines and texts with coordinates, and SVG is a way to write such a list. By hand:

    >>> sizes = {"GPU 0": 9.5, "GPU 1": 5.75}
    >>> scale = 300 / max(sizes.values())
    >>> for row, (device, size) in enumerate(sizes.items()):
    ...     print(f'<text x="0" y="{20 * row + 12}">{device}</text>')
    ...     print(f'<rect x="60" y="{20 * row}" width="{size * scale:.0f}" height="16"/>')
    <text x="0" y="12">GPU 0</text>
    <rect x="60" y="0" width="300" height="16"/>
    <text x="0" y="32">GPU 1</text>
    <rect x="60" y="20" width="182" height="16"/>

`canvas.Picture` adds what a good picture needs: colours that colour-blind readers can tell apart, hatches, texts that
are left out where they do not fit, a sentence for screen readers, marks (invisible rectangles, each with a sentence
about what lies under it, which is a tooltip), and `save`. Jupyter shows it as it is. For each topic
there are three functions: `plan_figure` makes the picture, `plan_text` the table that says the same, and `plan_label`
the sentence for those who cannot see it.

Reading order:

    canvas      boxes, lines, texts, legends, axes, and how they become SVG
    bars        stacked bars of bytes on one scale
    plan        what each device holds, and which layers rest where
    hosts       what each of several hosts holds, what goes over the line, and who works when
    shards      a checkpoint cut into files
    shares      items split between processes
    study       a quantized layer
    experts     which experts a token takes, and what a cache of them would have
    run         a model that runs while it is spread out, moment by moment
    ways        what links, GPUs and the CPU do for a token, way by way
    dryrun      what each device holds and does over a run, predicted and measured
    advice      the memory of each way to store a model, against a machine, and what a token waits for
    diagrams    blocks, arrows and braces: the drawn pictures of the course, continued in diagrams_run

Leaves out: controls (`widgets/`), and finding out what is drawn.
"""
