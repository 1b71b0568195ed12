//! Matrix products on strided views, through the `gemm` crate.
//!
//! A transposed operand is a view with its strides exchanged: nothing is copied. Each call computes on the calling
//! thread; the callers cut their work into pieces of fixed size for rayon, so that results do not depend on how many
//! threads there are.

/// Elements of a matrix, somewhere in a slice.
#[derive(Debug, Clone, Copy)]
struct Strides {
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Strides {
    /// Elements of a slice that holds this view.
    fn span(self) -> usize {
        match self.rows == 0 || self.columns == 0 {
            true => 0,
            false => (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1,
        }
    }
}

/// A matrix to read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    strides: Strides,
}

impl<'a> Matrix<'a> {
    /// Row-major, contiguous, `columns` wide.
    pub(super) fn new(values: &'a [f32], columns: usize) -> Self {
        Self::strided(values, values.len() / columns, columns, columns)
    }

    /// Row-major with rows `row_stride` apart.
    pub(super) fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let strides = Strides { rows, columns, row_stride, column_stride: 1 };
        assert!(strides.span() <= values.len(), "a view of {strides:?} in {} elements", values.len());
        Self { values, strides }
    }

    /// Columns `start..start + columns` of every row.
    pub(super) fn columns(self, start: usize, columns: usize) -> Self {
        assert!(self.strides.column_stride == 1 && start + columns <= self.strides.columns);
        Self { values: &self.values[start..], strides: Strides { columns, ..self.strides } }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        let Strides { rows, columns, row_stride, column_stride } = self.strides;
        let strides = Strides { rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride };
        Self { strides, ..self }
    }
}

/// A row-major matrix to write: `columns` wide, rows `row_stride` apart.
#[derive(Debug)]
pub(super) struct MatrixMut<'a> {
    values: &'a mut [f32],
    strides: Strides,
}

impl<'a> MatrixMut<'a> {
    /// Contiguous, `columns` wide.
    pub(super) fn new(values: &'a mut [f32], columns: usize) -> Self {
        let rows = values.len() / columns;
        Self::strided(values, rows, columns, columns)
    }

    /// Rows `row_stride` apart.
    pub(super) fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let strides = Strides { rows, columns, row_stride, column_stride: 1 };
        assert!(strides.span() <= values.len(), "a view of {strides:?} in {} elements", values.len());
        assert!(columns <= row_stride || rows <= 1, "rows overlap in {strides:?}");
        Self { values, strides }
    }
}

/// Whether a product replaces what was in its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    Replace,
    Add,
}

/// `destination` ← (0 or `destination`) + `left` · `right`.
pub(super) fn multiply(destination: MatrixMut<'_>, store: Store, left: Matrix<'_>, right: Matrix<'_>) {
    let MatrixMut { values, strides } = destination;
    let depth = left.strides.columns;
    assert_eq!((strides.rows, strides.columns), (left.strides.rows, right.strides.columns), "shape of a product");
    assert_eq!(depth, right.strides.rows, "inner dimension of a product");
    if strides.rows == 0 || strides.columns == 0 {
        return;
    }
    // SAFETY: the constructors have checked that each view of rows x columns with its strides lies within its slice, and
    // the asserts above that the three shapes belong together, so gemm reads and writes in bounds. `values` is
    // borrowed mutably and its rows do not overlap, hence no element is aliased. Strides fit isize as slices do.
    unsafe {
        gemm::gemm(
            strides.rows,
            strides.columns,
            depth,
            values.as_mut_ptr(),
            strides.column_stride as isize,
            strides.row_stride as isize,
            store == Store::Add,
            left.values.as_ptr(),
            left.strides.column_stride as isize,
            left.strides.row_stride as isize,
            right.values.as_ptr(),
            right.strides.column_stride as isize,
            right.strides.row_stride as isize,
            1.0_f32,
            1.0_f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(length: usize, seed: u64) -> Vec<f32> {
        let mut random = base::random::Random::new(seed, 0);
        (0..length).map(|_| random.next_normal()).collect()
    }

    #[test]
    fn strided_transposed_products_match_the_definition() {
        let (rows, depth, columns) = (5, 7, 3);
        let left = numbers(rows * 9, 1); // rows 9 apart, columns 2..9 used
        let right = numbers(columns * depth, 2); // [columns, depth], read transposed
        let mut found = vec![1.0; rows * 4]; // rows 4 apart, 3 used
        multiply(
            MatrixMut::strided(&mut found, rows, columns, 4),
            Store::Add,
            Matrix::new(&left, 9).columns(2, depth),
            Matrix::new(&right, depth).transposed(),
        );
        for row in 0..rows {
            for column in 0..columns {
                let dot: f32 = (0..depth).map(|d| left[row * 9 + 2 + d] * right[column * depth + d]).sum();
                assert!((found[row * 4 + column] - 1.0 - dot).abs() < 1e-5);
            }
            assert_eq!(found[row * 4 + 3], 1.0, "columns outside the view stay");
        }
    }

    #[test]
    #[should_panic(expected = "a view of")]
    fn views_outside_their_slice_are_our_own_mistake() {
        Matrix::strided(&[0.0; 10], 3, 4, 4);
    }
}
