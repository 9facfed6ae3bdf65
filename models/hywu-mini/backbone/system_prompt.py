"""The system prompts of the small checkpoint: one short line, which it was trained with."""

unified_system_prompt_en = "edit the photo"
t2i_system_prompts = {
    "en_vanilla": ["edit the photo"],
    "en_recaption": ["edit the photo"],
    "en_think_recaption": ["edit the photo"],
}
