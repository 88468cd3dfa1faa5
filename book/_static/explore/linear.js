// Small matrices as arrays of rows. Angles come from the cosines that a one-sided Jacobi SVD finds.
(() => {
  "use strict";
  const dot = (x, y) => x.reduce((sum, v, i) => sum + v * y[i], 0);
  const transpose = (M) => M[0].map((_, j) => M.map((row) => row[j]));
  const times = (A, B) => {
    const columns = transpose(B);
    return A.map((row) => columns.map((column) => dot(row, column)));
  };
  const block = (M, k, l = k) => M.slice(0, k).map((row) => row.slice(0, l));
  const squares = (M) => M.reduce((sum, row) => sum + dot(row, row), 0);

  // Singular values, largest first: columns are turned against each other, two by two, until all are orthogonal.
  function singularValues(M) {
    const columns = transpose(M);
    for (let sweep = 0, left = 1; sweep < 40 && left > 1e-24; sweep++) {
      left = 0;
      for (let p = 0; p < columns.length; p++)
        for (let q = p + 1; q < columns.length; q++) {
          const [x, y] = [columns[p], columns[q]];
          const [a, b, c] = [dot(x, x), dot(y, y), dot(x, y)];
          if (c * c <= 1e-30 * a * b || c === 0) continue;
          left += c * c;
          const z = (b - a) / (2 * c);
          const t = (z < 0 ? -1 : 1) / (Math.abs(z) + Math.hypot(1, z));
          const cos = 1 / Math.hypot(1, t);
          columns[p] = x.map((v, i) => cos * (v - t * y[i]));
          columns[q] = x.map((v, i) => cos * (t * v + y[i]));
        }
    }
    return columns.map((x) => Math.sqrt(dot(x, x))).sort((x, y) => y - x);
  }

  // Columns with the same spans as the first 1, 2, … columns of M, orthonormal.
  function orthonormal(M) {
    const found = [];
    for (let column of transpose(M)) {
      for (let again = 0; again < 2; again++)
        for (const q of found) {
          const along = dot(q, column);
          column = column.map((v, i) => v - along * q[i]);
        }
      const norm = Math.sqrt(dot(column, column));
      found.push(column.map((v) => v / norm));
    }
    return transpose(found);
  }

  // A source of normal numbers that begins anew from its seed.
  function normal(seed) {
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  const gaussian = (rows, columns, draw) => Array.from({ length: rows }, () => Array.from({ length: columns }, draw));

  explore.linear = { dot, times, transpose, block, squares, singularValues, orthonormal, normal, gaussian };
})();
