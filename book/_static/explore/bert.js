// A sentence encoder in the page: pieces of words, layers of attention, and adapters beside the weights. Its numbers are
// those of `lora_opcm.site.live`, in whole numbers of 8 bits.
(() => {
  "use strict";
  const HEADS = 12,
    LONGEST = 64, // tokens
    TINY = 1e-12;

  function bytes(text) {
    const raw = atob(text),
      found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }
  const floats = (text) => new Float32Array(bytes(text).buffer);

  // Name → a matrix {rows, columns, at(row, out)} that is still in 8 bits, or a vector.
  function unpack(pack) {
    const found = {},
      scales = floats(pack.scales),
      whole = new Int8Array(bytes(pack.bytes).buffer),
      numbers = floats(pack.numbers);
    let row = 0,
      start = 0;
    for (const [name, rows, columns] of pack.matrices) {
      const [mine, size] = [scales.subarray(row, row + rows), whole.subarray(start, start + rows * columns)];
      const at = (r) => Float32Array.from(size.subarray(r * columns, (r + 1) * columns), (x) => x * mine[r]);
      found[name] = { rows, columns, at };
      row += rows;
      start += rows * columns;
    }
    start = 0;
    for (const [name, length] of pack.vectors) found[name] = numbers.subarray(start, (start += length));
    return found;
  }
  function unrolled({ rows, columns, at }) {
    const data = new Float32Array(rows * columns);
    for (let r = 0; r < rows; r++) data.set(at(r), r * columns);
    return { rows, columns, data };
  }

  // x Wᵀ + b for rows of x, four of them by two rows of W at a time, which reads each number half as often. W has an even
  // number of rows.
  function product(x, { rows, columns, data }, bias) {
    const count = x.length / columns,
      y = new Float32Array(count * rows);
    for (let t = 0; t < count; t += 4) {
      const [a, b, c, d] = [0, 1, 2, 3].map((k) => Math.min(t + k, count - 1) * columns);
      for (let o = 0; o < rows; o += 2) {
        const w = o * columns,
          v = w + columns;
        let p = 0,
          q = 0,
          r = 0,
          s = 0,
          e = 0,
          f = 0,
          g = 0,
          h = 0;
        for (let i = 0; i < columns; i++) {
          const one = data[w + i],
            two = data[v + i],
            xa = x[a + i],
            xb = x[b + i],
            xc = x[c + i],
            xd = x[d + i];
          p += one * xa;
          q += one * xb;
          r += one * xc;
          s += one * xd;
          e += two * xa;
          f += two * xb;
          g += two * xc;
          h += two * xd;
        }
        const found = [p, q, r, s, e, f, g, h];
        for (let k = 0; k < Math.min(4, count - t); k++)
          for (const side of [0, 1]) y[(t + k) * rows + o + side] = found[k + 4 * side] + (bias ? bias[o + side] : 0);
      }
    }
    return y;
  }

  // y + scale · (x Aᵀ) Bᵀ, where a row of `left` is a column of B.
  function beside(y, x, { left, right }, scale) {
    const low = product(x, right),
      [rank, m] = [left.rows, left.columns];
    for (let t = 0; t * rank < low.length; t++)
      for (let k = 0; k < rank; k++) {
        const much = scale * low[t * rank + k];
        for (let o = 0; o < m; o++) y[t * m + o] += much * left.data[k * m + o];
      }
    return y;
  }

  function normalised(x, weight, bias) {
    const n = weight.length;
    for (let t = 0; t < x.length; t += n) {
      const row = x.subarray(t, t + n);
      let mean = 0,
        square = 0;
      for (const v of row) mean += v / n;
      for (const v of row) square += (v - mean) ** 2 / n;
      const by = 1 / Math.sqrt(square + TINY);
      for (let i = 0; i < n; i++) row[i] = (row[i] - mean) * by * weight[i] + bias[i];
    }
    return x;
  }

  // x (1 + erf(x / √2)) / 2, by formula 7.1.26 of Abramowitz and Stegun, good to 1.5e-7.
  function gelu(x) {
    for (let i = 0; i < x.length; i++) {
      const z = Math.abs(x[i]) * Math.SQRT1_2,
        t = 1 / (1 + 0.3275911 * z);
      const poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
      const erf = 1 - poly * Math.exp(-z * z);
      x[i] *= (1 + Math.sign(x[i]) * erf) / 2;
    }
    return x;
  }

  function attended(q, k, v, n) {
    const count = q.length / n,
      size = n / HEADS,
      found = new Float32Array(q.length),
      share = new Float32Array(count);
    for (let h = 0; h < n; h += size)
      for (let t = 0; t < count; t++) {
        let most = -Infinity,
          sum = 0;
        for (let u = 0; u < count; u++) {
          let dot = 0;
          for (let i = h; i < h + size; i++) dot += q[t * n + i] * k[u * n + i];
          most = Math.max(most, (share[u] = dot / Math.sqrt(size)));
        }
        for (let u = 0; u < count; u++) sum += share[u] = Math.exp(share[u] - most);
        for (let u = 0; u < count; u++)
          for (let i = h; i < h + size; i++) found[t * n + i] += (share[u] / sum) * v[u * n + i];
      }
    return found;
  }

  // What BERT's own tokeniser makes of a text, as numbers.
  function pieces(text, vocabulary) {
    const clean = text
      .replace(/[\t\n\r]/g, " ")
      .replace(/[\p{C}\uFFFD]/gu, "")
      .normalize("NFD")
      .replace(/\p{Mn}/gu, "")
      .toLowerCase()
      .replace(/[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff]/g, " $& ")
      .replace(/[!-/:-@[-`{-~\p{P}]/gu, " $& ");
    const found = [vocabulary.get("[CLS]")];
    for (const word of clean.split(/\s+/).filter(Boolean)) {
      const mine = [];
      let start = [...word].length > 100 ? -1 : 0; // −1: no such word
      while (start >= 0 && start < word.length) {
        let end = word.length;
        const piece = () => vocabulary.get((start ? "##" : "") + word.slice(start, end));
        while (end > start && piece() === undefined) end--;
        if (end > start) mine.push(piece());
        start = end > start ? end : -1;
      }
      found.push(...(start < 0 ? [vocabulary.get("[UNK]")] : mine));
    }
    return [...found.slice(0, LONGEST - 1), vocabulary.get("[SEP]")];
  }

  explore.bert = {
    // The factors of a pack by layer, and its head if it has one.
    adapter(pack) {
      const held = unpack(pack),
        modules = {};
      for (const [name, x] of Object.entries(held)) {
        const [module, side] = name.split("/");
        if (side) (modules[module] ??= {})[side] = unrolled(x);
      }
      return { modules, head: held.head };
    },

    model(words, layers) {
      const first = unpack(words),
        vocabulary = new Map(words.vocabulary.split("\n").map((word, i) => [word, i]));
      const rest = layers.map((pack) =>
        Object.fromEntries(Object.entries(unpack(pack)).map(([name, x]) => [name, x.rows ? unrolled(x) : x])),
      );
      const n = first["LayerNorm.weight"].length;

      // One embedding of length one, with an adapter beside the weights. Between layers the page may do other things;
      // if `go()` says no by then, there is none.
      async function embed(ids, adapter, scale = 1, go = () => true) {
        const x = new Float32Array(ids.length * n),
          kind = first["token_type_embeddings.weight"].at(0);
        ids.forEach((id, t) => {
          const [word, place] = [first["word_embeddings.weight"].at(id), first["position_embeddings.weight"].at(t)];
          for (let i = 0; i < n; i++) x[t * n + i] = word[i] + place[i] + kind[i];
        });
        let state = normalised(x, first["LayerNorm.weight"], first["LayerNorm.bias"]);
        for (const [i, layer] of rest.entries()) {
          await new Promise((done) => setTimeout(done));
          if (!go()) return undefined;
          const linear = (input, name) => {
            const found = product(input, layer[`${name}.weight`], layer[`${name}.bias`]),
              update = adapter?.modules[`encoder.layer.${i}.${name}`];
            return update && scale ? beside(found, input, update, scale) : found;
          };
          const onto = (input, more, name) => {
            for (let k = 0; k < more.length; k++) more[k] += input[k];
            return normalised(more, layer[`${name}.LayerNorm.weight`], layer[`${name}.LayerNorm.bias`]);
          };
          const [q, k, v] = ["query", "key", "value"].map((name) => linear(state, `attention.self.${name}`));
          state = onto(state, linear(attended(q, k, v, n), "attention.output.dense"), "attention.output");
          state = onto(state, linear(gelu(linear(state, "intermediate.dense")), "output.dense"), "output");
        }
        const mean = new Float32Array(n);
        state.forEach((value, i) => (mean[i % n] += value));
        const size = Math.hypot(...mean);
        return mean.map((value) => value / size);
      }
      return { pieces: (text) => pieces(text, vocabulary), embed };
    },

    // The probabilities of the labels, whose sentences are the rows of the head.
    probabilities(z, head, scale) {
      const logits = Array.from({ length: head.length / z.length }, (_, label) => {
        let dot = 0;
        for (let i = 0; i < z.length; i++) dot += z[i] * head[label * z.length + i];
        return scale * dot;
      });
      const most = Math.max(...logits),
        grown = logits.map((x) => Math.exp(x - most)),
        sum = grown.reduce((a, b) => a + b);
      return grown.map((x) => x / sum);
    },
  };
})();
