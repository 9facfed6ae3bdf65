"""The native core of HY-WU: one edit from pictures and an instruction to pixels, without ComfyUI.

Tensor names end in capital letters, one per axis, in axis order (the key lives here and nowhere else):

    B rows (2 under guidance)   L sequence        D backbone width     H heads        Q head width
    T routed rows (B*L)         K experts a token E experts            F expert width
    N backbone layers           R LoRA rank       I / O in / out width of a LoRA target
    P parameter tokens a layer  C parameter-token width                S condition length   G generator width
    V vocabulary                W rows of width G a layer inside the generator's blocks

Pictures and latents use lower-case axes as in ``pixels_bchw`` and ``latent_bchw``; module parameters keep the names of the
published checkpoint. Floors (a file imports from floors below its own only)::

    7 cli                        6 edit, training                5 sampling, generator, describe
    4 condition, think, lora     3 handle, backbone, text        2 vision, checkpoint
    1 kernels, config, json_fields, errors, progress, seeds
"""
