//! Matrix products whose every element is summed in one fixed order.
//!
//! A tuned kernel picks its blocking by the shapes, so the same row gives different last bits in a chunk of 7 and in a
//! chunk of 16. Here a row of the result depends on its row and on the matrix alone. At this model's sizes plain loops
//! cost no more than the tuned kernel's set-up.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

/// `rows [m, k] × matrix [k, n]`, both contiguous.
pub(super) fn product(rows: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    rows.apply_op2_no_bwd(matrix, &Product { transposed: false })
}

/// `rows [m, k] × (matrix [n, k])ᵀ`, both contiguous.
pub(super) fn product_transposed(rows: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    rows.apply_op2_no_bwd(matrix, &Product { transposed: true })
}

struct Product {
    transposed: bool,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "fixed-order-product"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        rows_layout: &Layout,
        matrix: &CpuStorage,
        matrix_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (m, inner) = rows_layout.shape().dims2()?;
        let (k, n) = match (self.transposed, matrix_layout.shape().dims2()?) {
            (false, dims) => dims,
            (true, (n, k)) => (k, n),
        };
        if inner != k {
            bail!("a product of rows of {inner} with a matrix of {k} rows")
        }
        let rows = elements(rows, rows_layout)?;
        let matrix = elements(matrix, matrix_layout)?;
        let mut result = vec![0.0; m * n];
        for (row, out) in rows.chunks_exact(k).zip(result.chunks_exact_mut(n)) {
            if self.transposed {
                for (out, column) in out.iter_mut().zip(matrix.chunks_exact(k)) {
                    *out = dot(row, column);
                }
            } else {
                for (x, weights) in row.iter().zip(matrix.chunks_exact(n)) {
                    for (out, weight) in out.iter_mut().zip(weights) {
                        *out += x * weight;
                    }
                }
            }
        }
        Ok((CpuStorage::F32(result), Shape::from((m, n))))
    }
}

/// Four interleaved sums, so that one addition need not wait for the one before.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f32 = a
        .remainder()
        .iter()
        .zip(b.remainder())
        .map(|(x, y)| x * y)
        .sum();
    let mut sums = [0.0; 4];
    for (a, b) in a.zip(b) {
        for (sum, (x, y)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += x * y;
        }
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a product needs contiguous operands"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn numbers(rows: usize, columns: usize, step: f32) -> Tensor {
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| (i as f32 * step).sin())
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("tensor")
    }

    #[test]
    fn products_agree_with_the_library_and_do_not_depend_on_the_other_rows() {
        for (m, k, n) in [(1, 1, 1), (3, 32, 17), (7, 130, 64), (2, 5, 3)] {
            let (rows, matrix) = (numbers(m, k, 0.7), numbers(k, n, 1.3));
            let transposed = matrix.t().and_then(|t| t.contiguous()).expect("transposed");
            let expected: Vec<f32> = rows
                .matmul(&matrix)
                .and_then(|t| t.flatten_all()?.to_vec1())
                .expect("matmul");
            let plain = product(&rows, &matrix).expect("product");
            let turned = product_transposed(&rows, &transposed).expect("product");
            for result in [&plain, &turned] {
                let values: Vec<f32> = result
                    .flatten_all()
                    .and_then(|t| t.to_vec1())
                    .expect("values");
                assert!(
                    values
                        .iter()
                        .zip(&expected)
                        .all(|(a, b)| (a - b).abs() < 1e-4)
                );
            }
            let last = rows.narrow(0, m - 1, 1).expect("row");
            let alone: Vec<Vec<f32>> = product(&last, &matrix)
                .and_then(|t| t.to_vec2())
                .expect("product");
            let among: Vec<Vec<f32>> = plain.to_vec2().expect("values");
            assert_eq!(alone[0], among[m - 1]);
        }
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        assert!(product(&numbers(2, 3, 1.0), &numbers(4, 3, 1.0)).is_err());
        assert!(product_transposed(&numbers(2, 3, 1.0), &numbers(4, 2, 1.0)).is_err());
        let strided = numbers(3, 4, 1.0).t().expect("a view");
        assert!(product(&numbers(2, 4, 1.0), &strided).is_err());
    }
}
