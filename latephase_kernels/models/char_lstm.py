"""Character LSTM for text such as enwik8: embedding, LSTM, linear layer.

Shapes: N streams of text, S symbols a window, V different symbols.
Source: von Oswald et al., ICLR 2021, the language model on enwik8 (500 units, 1.56 M parameters in all).
"""

from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class CharLSTM(nn.Module):
    """Predicts each next symbol of a text.

    The paper's size follows from an embedding of as many dimensions as there are symbols: for enwik8's 205 symbols and
    500 units 205·205 + 4·500·(205 + 500 + 2) + 501·205 = 1,558,730 parameters, 1.56 M. (Fed with one-hot vectors the
    LSTM would have 1.52 M.) Its late-phase weights are rank-1 gains on the LSTM alone:

        expand(model, num_members, targets=lambda name, module: "rank1" if name == "lstm" else False)

    Args:
        num_symbols: V.
        hidden_size: units of a layer.
        num_layers: of the LSTM.
        embedding_size: None for V.
    """

    def __init__(
        self, num_symbols: int = 205, hidden_size: int = 500, *, num_layers: int = 1, embedding_size: int | None = None
    ):
        super().__init__()
        embedding_size = num_symbols if embedding_size is None else embedding_size
        self.embedding = nn.Embedding(num_symbols, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_symbols)

    def forward(self, symbols: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read a window of each stream, after the windows that gave this state.

        Args:
            symbols: [N, S] int64.
            state: what the call before returned; None where the streams begin.

        Returns:
            Logits of the next symbols [N, S, V], and the state for the next window, (h, c) [layers, N, hidden_size]
            each, detached: gradients end at the window's first symbol (truncated backpropagation through time).
        """
        output, (h, c) = self.lstm(self.embedding(symbols), state)
        return self.fc(output), (h.detach(), c.detach())
