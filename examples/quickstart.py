"""Prunes, distils and measures a model in Python, and writes the model card.

    python examples/quickstart.py TEACHER TRAIN EVAL OUTPUT_DIR [MAX_STEPS]

TEACHER is a Hub id or a folder; TRAIN and EVAL are Hub datasets or files with a `text` column.
"""

from __future__ import annotations

import sys

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    evaluate_models,
    load_model,
    load_text_dataset,
    load_tokenizer,
    prune_model,
)


def main(teacher_id: str, train_source: str, eval_source: str, output_dir: str, max_steps: str = "200") -> None:
    """Prune and distil `teacher_id`; write the student to `output_dir`."""
    teacher, tokenizer = load_model(teacher_id, dtype="float32"), load_tokenizer(teacher_id)
    train, held_out = load_text_dataset(train_source), load_text_dataset(eval_source)

    student = prune_model(
        teacher,
        PrunerConfig(hidden_size=0.75, intermediate_size=0.65),
        calibration_data=train,
        processing_class=tokenizer,
        num_rows=128,
        max_length=128,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir, max_steps=int(max_steps), max_length=128, learning_rate=1e-3, packing=True
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    evaluate_models(
        {"teacher": teacher, "student": student},
        held_out,
        processing_class=tokenizer,
        num_rows=50,
        output_path=output_dir,
    )
    trainer.create_model_card()
    # trainer.push_to_hub()  # weights, tokenizer, plan, plots, evaluation and card, in one commit


if __name__ == "__main__":
    main(*sys.argv[1:])
