r"""Transformers and PEFT: LoRA adapters on a tiny BERT learn to tell three languages apart; only adapters travel.

    python server_main.py --rounds 3 \
        --aggregate "*lora_*=fedavg" --aggregate "*modules_to_save*=fedavg" --aggregate local
    python client_main.py --rank 1
    python client_main.py --rank 2
    python examples/lora_languages.py --rank 1
    python examples/lora_languages.py --rank 2

Needs `pip install fedsplit[transformers]`, and no network: the model is made from a configuration with random weights,
the text is below, and the tokens are its letters. The split keeps the frozen base at home; with `--adapter-only` it is
no part of the federation at all, and the server needs no `--aggregate`. Three rounds reach an accuracy over 0.7; chance
is 0.33.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

import fedsplit
from fedsplit.integrations.transformers import adapter_state, federate

WINDOW, HELD_OUT = 40, 0.2
LETTERS = " abcdefghijklmnopqrstuvwxyzäöüßàâçéèêëîïôùûœ,.'"

ENGLISH = """
The old lighthouse stood at the end of the harbour, and every evening the keeper climbed the narrow stairs to
light the lamp. In winter the wind blew so hard that he could hear nothing else, and the waves threw their white
foam against the windows. He had lived there for thirty years, together with a black dog and a great many books.
On Sundays his daughter came over from the village with fresh bread, some cheese and the newspapers of the week.
They would sit by the stove, drink tea and talk about the weather, the fishing boats and the people who had
moved away. When the days grew longer again, the children walked along the beach to look for shells and coloured
glass. Some of them asked him whether he was ever lonely. He laughed, and told them that the sea never stops
talking to those who listen. At night, when the light turned slowly above the water, the sailors far outside
knew which way to steer, and they thought of him with gratitude. One spring a letter arrived which said that the
lamp would be replaced by a machine. He read it twice, put it into the drawer under the table, and went up the
stairs as he had always done. The dog followed him, step by step, to the top.
"""

GERMAN = """
Der alte Leuchtturm stand am Ende des Hafens, und jeden Abend stieg der Wärter die schmale Treppe hinauf, um die
Lampe anzuzünden. Im Winter blies der Wind so stark, dass er nichts anderes hören konnte, und die Wellen warfen
ihren weißen Schaum gegen die Fenster. Er lebte dort seit dreißig Jahren, zusammen mit einem schwarzen Hund und
sehr vielen Büchern. Am Sonntag kam seine Tochter aus dem Dorf herüber und brachte frisches Brot, etwas Käse und
die Zeitungen der Woche. Sie saßen dann am Ofen, tranken Tee und sprachen über das Wetter, die Fischerboote und
die Leute, die fortgezogen waren. Wenn die Tage wieder länger wurden, gingen die Kinder am Strand entlang, um
Muscheln und buntes Glas zu suchen. Manche fragten ihn, ob er nicht manchmal einsam sei. Er lachte und sagte,
das Meer höre nie auf, mit denen zu reden, die ihm zuhören. In der Nacht, wenn sich das Licht langsam über dem
Wasser drehte, wussten die Seeleute weit draußen, wohin sie steuern mussten, und dachten dankbar an ihn. In
einem Frühling kam ein Brief, in dem stand, dass eine Maschine die Lampe ersetzen würde. Er las ihn zweimal,
legte ihn in die Schublade und ging die Treppe hinauf, wie er es immer getan hatte.
"""

FRENCH = """
Le vieux phare se dressait au bout du port, et chaque soir le gardien montait l'escalier étroit pour allumer la
lampe. En hiver, le vent soufflait si fort qu'il n'entendait plus rien d'autre, et les vagues jetaient leur
écume blanche contre les fenêtres. Il vivait là depuis trente ans, avec un chien noir et une grande quantité de
livres. Le dimanche, sa fille venait du village avec du pain frais, un peu de fromage et les journaux de la
semaine. Ils s'asseyaient près du poêle, buvaient du thé et parlaient du temps, des bateaux de pêche et des gens
qui étaient partis. Quand les jours rallongeaient, les enfants marchaient le long de la plage pour chercher des
coquillages et du verre coloré. Certains lui demandaient s'il ne se sentait jamais seul. Il riait, et leur
disait que la mer ne cesse jamais de parler à ceux qui l'écoutent. La nuit, quand la lumière tournait lentement
au-dessus de l'eau, les marins savaient au loin quelle route suivre, et ils pensaient à lui avec gratitude. Un
printemps, une lettre arriva, qui annonçait que la lampe serait remplacée par une machine. Il la lut deux fois,
la rangea dans le tiroir, et remonta l'escalier comme il l'avait toujours fait. Le chien le suivait, marche
après marche, jusqu'en haut.
"""


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Pieces of the texts, each with the number of its language."""

    def __init__(self, *, held_out: bool, rank: int = 1, ranks: int = 1) -> None:
        self.pieces: list[tuple[str, int]] = []
        for label, text in enumerate((ENGLISH, GERMAN, FRENCH)):
            text = " ".join(text.lower().split())
            border = int(len(text) * (1 - HELD_OUT))
            part = text[border:] if held_out else text[:border]
            self.pieces += [(part[at : at + WINDOW], label) for at in range(0, len(part) - WINDOW, 3)]
        self.pieces = self.pieces[rank - 1 :: ranks]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text, label = self.pieces[index]
        return {"input_ids": torch.tensor([LETTERS.find(letter) + 1 for letter in text]), "labels": torch.tensor(label)}


def make_model() -> PeftModel:
    """The same random base and the same adapters in every trainer."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(LETTERS) + 1, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=WINDOW, num_labels=3, initializer_range=0.1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "key", "value", "dense"]))


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(model: PeftModel, rank: int, ranks: int, output_dir: str) -> HuggingFaceTrainer:
    settings = TrainingArguments(
        output_dir=output_dir, per_device_train_batch_size=16, per_device_eval_batch_size=64, learning_rate=5e-3,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="epoch", disable_tqdm=True, seed=rank,
    )  # fmt: skip
    return HuggingFaceTrainer(
        model, settings, train_dataset=Windows(held_out=False, rank=rank, ranks=ranks),
        eval_dataset=Windows(held_out=True), compute_metrics=accuracy,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--exchange-dir", default="exchange")
    parser.add_argument("--checkpoint-dir", default="checkpoints")
    parser.add_argument("--epochs", type=float, default=3.0, help="of a round")
    parser.add_argument("--adapter-only", action="store_true", help="keep the base out of the federation")
    parser.add_argument("--standalone", action="store_true", help="without a federation, for a debugger")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = make_model()
    hf_trainer = make_trainer(model, arguments.rank, arguments.ranks, f"logs/rank-{arguments.rank}")
    # Was: hf_trainer.train()
    with fedsplit.Trainer(
        arguments.rank, adapter_state(model) if arguments.adapter_only else model, exchange_dir=arguments.exchange_dir,
        checkpoint_dir=arguments.checkpoint_dir, standalone=arguments.standalone,
    ) as trainer:  # fmt: skip
        federate(trainer, hf_trainer, epochs_per_round=arguments.epochs, adapter_only=arguments.adapter_only)


if __name__ == "__main__":
    main()
